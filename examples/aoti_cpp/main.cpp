// Runs an artifact of format "aoti" from C++, without Python: one request of the artifact's own schedule.
//
//   run ARTIFACT INPUTS.safetensors OUTPUTS.safetensors
//
// INPUTS has each tensor of the model's call with one more axis in front, one entry for each step. OUTPUTS gets
// "output_0", likewise. Partial steps recompute evenly spaced tokens; a policy that scores tokens would choose them
// here from the outputs "score_...". Steps that forecast (TaylorSeer) are left out of this example.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>

#include "json.hpp"

using Tensors = std::unordered_map<std::string, at::Tensor>;
using Loader = torch::inductor::AOTIModelPackageLoader;

static std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

static const std::map<std::string, at::ScalarType> kTypes = {
    {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16},
    {"I64", at::kLong},   {"I32", at::kInt},   {"U8", at::kByte},  {"BOOL", at::kBool}};

// The tensors of a safetensors file, each a copy: 8 bytes with the length of a JSON header, the header, the bytes.
static Tensors load(const std::string& path) {
  const std::string bytes = read(path);
  uint64_t length;
  std::memcpy(&length, bytes.data(), sizeof length);
  Tensors found;
  for (const auto& [name, entry] : Json::parse(bytes.substr(8, length)).fields) {
    if (name == "__metadata__") continue;
    std::vector<int64_t> shape;
    for (const Json& size : entry["shape"].items) shape.push_back(static_cast<int64_t>(size.number));
    at::Tensor tensor = at::empty(shape, kTypes.at(entry["dtype"].text));
    const auto start = static_cast<size_t>(entry["data_offsets"].items[0].number);
    std::memcpy(tensor.data_ptr(), bytes.data() + 8 + length + start, tensor.nbytes());
    found[name] = tensor;
  }
  return found;
}

static void save(const std::string& path, const std::string& name, const at::Tensor& tensor) {
  std::string shape;
  for (int64_t size : tensor.sizes()) shape += (shape.empty() ? "" : ",") + std::to_string(size);
  const std::string header = "{\"" + name + "\":{\"dtype\":\"F32\",\"shape\":[" + shape + "],\"data_offsets\":[0," +
                             std::to_string(tensor.nbytes()) + "]}}";
  const uint64_t length = header.size();
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), sizeof length);
  file << header;
  file.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  if (!file) throw std::runtime_error("cannot write " + path);
}

// A size of the manifest: a number, or a text such as "2*batch+1".
static int64_t size(const Json& size, int64_t batch) {
  if (size.kind == Json::Number) return static_cast<int64_t>(size.number);
  const std::string& text = size.text;
  const auto times = text.find('*'), plus = text.find('+');
  const int64_t factor = times == std::string::npos ? 1 : std::stoll(text);
  return factor * batch + (plus == std::string::npos ? 0 : std::stoll(text.substr(plus + 1)));
}

class Artifact {
 public:
  explicit Artifact(const std::string& folder) : manifest_(Json::parse(read(folder + "/manifest.json"))) {
    if (manifest_["format"].text != "aoti") throw std::runtime_error(folder + " is no artifact of format aoti");
    if (manifest_["policy"]["rule"].kind != Json::Null) {
      throw std::runtime_error(folder + ": its policy decides while it runs; load it in Python");
    }
    weights_ = load(folder + "/" + manifest_["weights"]["file"]["path"].text);
    for (const auto& [name, graph] : manifest_["graphs"].fields) {
      auto loader = std::make_unique<Loader>(folder + "/" + graph["file"]["path"].text, name);
      Tensors own;  // the same memory for every graph
      for (const std::string& each : loader->get_constant_fqns()) own[each] = weights_.at(each);
      loader->load_constants(own, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
      loaders_[name] = std::move(loader);
    }
  }

  int64_t steps() const { return static_cast<int64_t>(manifest_["schedule"]["steps"].items.size()); }

  // One step; what it leaves for later ones is in `state`, which starts empty.
  at::Tensor step(int64_t index, const Tensors& call, Tensors& state) {
    const Json& schedule = manifest_["schedule"];
    const Json& plan = schedule["plans"].items[static_cast<size_t>(schedule["steps"].items[index].number)];
    const Json& variant = manifest_["variants"][plan["variant"].text];
    for (const auto& [name, tensor] : call) state[name] = tensor;
    if (index == 0) run(manifest_["prologue"].text, state, "");
    if (variant["rows"].kind == Json::String) run(variant["rows"].text, state, "");
    const int64_t batch = call.at(manifest_["signature"]["latent"].text).size(0);
    for (const auto& [branch, count] : plan["counts"].fields) {
      state["tokens_" + branch] = chosen(branch, static_cast<int64_t>(count.number), batch);
    }
    run(variant["graph"].text, state, "cache_");
    return state.at("output_0");
  }

 private:
  at::Tensor chosen(const std::string& branch, int64_t count, int64_t batch) const {
    for (const Json& each : manifest_["branches"].items) {
      if (each["index"].number != std::stod(branch)) continue;
      const auto tokens = static_cast<int64_t>(each["tokens"].number);
      const at::Tensor places = at::arange(count, at::kLong) * tokens / count;
      return places.floor().to(at::kLong).expand({size(each["rows"], batch), count}).contiguous();
    }
    throw std::runtime_error("there is no branch " + branch);
  }

  // Runs a graph on the values of its inputs; of its results, those that later steps read get a prefix.
  void run(const std::string& name, Tensors& state, const std::string& prefix) {
    const Json& graph = manifest_["graphs"][name];
    std::vector<at::Tensor> inputs;
    for (const Json& each : graph["inputs"].items) inputs.push_back(state.at(each["name"].text).contiguous());
    const std::vector<at::Tensor> outputs = loaders_.at(name)->run(inputs);
    for (size_t i = 0; i < outputs.size(); ++i) {
      const std::string& result = graph["outputs"].items[i]["name"].text;
      const bool leaves = result.rfind("output_", 0) == 0 || result.rfind("score_", 0) == 0;
      state[leaves ? result : prefix + result] = outputs[i];
    }
  }

  Json manifest_;
  Tensors weights_;
  std::map<std::string, std::unique_ptr<Loader>> loaders_;
};

int main(int count, char** arguments) try {
  if (count != 4) throw std::runtime_error("usage: run ARTIFACT INPUTS.safetensors OUTPUTS.safetensors");
  Artifact artifact(arguments[1]);
  const Tensors inputs = load(arguments[2]);
  Tensors state;
  std::vector<at::Tensor> outputs;
  for (int64_t step = 0; step < artifact.steps(); ++step) {
    Tensors call;
    for (const auto& [name, tensor] : inputs) call[name] = tensor[step];
    outputs.push_back(artifact.step(step, call, state).clone());
  }
  save(arguments[3], "output_0", at::stack(outputs).contiguous());
  std::cout << outputs.size() << " steps\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
