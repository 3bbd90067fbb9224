"""Serves an artifact of the embedded model over HTTP; concurrent requests run as one batch.

    pip install 'duca-compile[export,serve]'
    duca-compile export demo-artifact --steps 20
    python examples/serve.py demo-artifact
    curl 'localhost:8000/generate?label=9&seed=1' --output boot.png

Neither torch nor diffusers is imported: the loop uses numpy. Images of a batch do not depend on each other, so a
request gives the same result as alone, up to rounding.
"""

import argparse
import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, Query, Response
from PIL import Image

import duca_compile
from duca_compile import Artifact

TRAINED = 1000  # timesteps that the model was trained with


class Sampler:
    """DDIM (arXiv 2010.02502) with classifier-free guidance, for a model that predicts v (arXiv 2202.00512).

    The noise schedule is the cosine schedule, rescaled to end in pure noise (arXiv 2305.08891), with trailing
    timesteps, as the embedded model was trained for.
    """

    def __init__(self, artifact: Artifact) -> None:
        with resources.as_file(resources.files("duca_compile") / "app" / "data" / "demo") as folder:
            info = json.loads((folder / "demo.json").read_text())
        self.names: list[str] = info["class_names"]
        self._null, self._scale = info["null_class"], np.float32(info["guidance_scale"])
        self._artifact = artifact
        steps = artifact.manifest.schedule.num_inference_steps
        if steps is None:
            raise SystemExit("this artifact has no fixed number of steps; export it with num_inference_steps")
        self._times = np.round(np.arange(TRAINED, 0, -TRAINED / steps)).astype(np.int64) - 1
        self._stride = TRAINED // steps
        self._signal = _signal()

    def generate(self, labels: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        """Generates images, float32 (requests, height, width) in [-1, 1], in one request of the artifact."""
        config = self._artifact.manifest.source.config
        shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        latent = np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds])
        classes = np.array([*labels, *[self._null] * len(labels)])
        with self._artifact.session() as model:
            for time in self._times:
                both = np.concatenate([latent, latent])
                output = model(both, timestep=np.full(len(both), time), class_labels=classes).sample
                conditional, unconditional = np.split(output, 2)
                guided = unconditional + self._scale * (conditional - unconditional)
                latent = self._previous(latent, guided, int(time))
        return latent[:, 0].clip(-1, 1)

    def _previous(self, latent: np.ndarray, v: np.ndarray, time: int) -> np.ndarray:
        now, before = self._signal[time], self._signal[time - self._stride] if time >= self._stride else 1.0
        image = np.sqrt(now) * latent - np.sqrt(1 - now) * v
        noise = np.sqrt(now) * v + np.sqrt(1 - now) * latent
        return (np.sqrt(before) * image + np.sqrt(1 - before) * noise).astype(np.float32)


def _signal() -> np.ndarray:
    """The signal's share of the variance at each timestep, (1000,)."""
    edges = np.cos((np.arange(TRAINED + 1) / TRAINED + 0.008) / 1.008 * np.pi / 2) ** 2
    root = np.sqrt(np.cumprod(1 - np.minimum(1 - edges[1:] / edges[:-1], 0.999)))
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@dataclass
class Batcher:
    """Waits ``window`` seconds after a first request for others, and generates at most ``limit`` images together."""

    sampler: Sampler
    limit: int
    window: float

    def __post_init__(self) -> None:
        self._waiting: asyncio.Queue[tuple[int, int, asyncio.Future[np.ndarray]]] = asyncio.Queue()
        self.sizes: list[int] = []  # sizes of the batches so far

    async def generate(self, label: int, seed: int) -> np.ndarray:
        result: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        await self._waiting.put((label, seed, result))
        return await result

    async def run(self) -> None:
        """Serves batches forever: one runs at a time, in a thread of its own, while the next one is collected."""
        while True:
            batch = [await self._waiting.get()]
            await asyncio.sleep(self.window)
            while len(batch) < self.limit and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            labels, seeds, results = zip(*batch, strict=True)
            self.sizes.append(len(batch))
            try:
                images = await asyncio.to_thread(self.sampler.generate, labels, seeds)
            except Exception as error:
                for result in results:
                    result.set_exception(error)
                continue
            for result, image in zip(results, images, strict=True):
                if not result.cancelled():
                    result.set_result(image)


def create_app(batcher: Batcher) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="duca_compile artifact", lifespan=lifespan)

    @app.get("/classes")
    async def classes() -> list[str]:
        return batcher.sampler.names

    @app.get("/generate")
    async def generate(
        label: Annotated[int, Query(ge=0, lt=len(batcher.sampler.names))],
        seed: Annotated[int, Query(ge=0)] = 0,
        form: Annotated[Literal["png", "npy"], Query(alias="format")] = "png",
    ) -> Response:
        image = await batcher.generate(label, seed)
        content = io.BytesIO()
        if form == "npy":
            np.save(content, image)
            return Response(content.getvalue(), media_type="application/octet-stream")
        Image.fromarray(((image + 1) * 127.5).round().astype(np.uint8)).save(content, "png")
        return Response(content.getvalue(), media_type="image/png")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves an artifact of the embedded model over HTTP.")
    parser.add_argument("artifact", type=Path, help="the folder that `duca-compile export` wrote")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--limit", type=int, default=8, help="the most images in a batch")
    parser.add_argument("--window", type=float, default=0.02, help="seconds to wait for further requests of a batch")
    parser.add_argument("--threads", type=int, help="threads of one operator; by default, one for each core")
    arguments = parser.parse_args()
    artifact = duca_compile.load(arguments.artifact, threads=arguments.threads)
    batcher = Batcher(Sampler(artifact), arguments.limit, arguments.window)
    uvicorn.run(create_app(batcher), host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    main()
