"""Inductor, torch.compile's compiler; ``private`` holds all that it needs of torch and that is not public."""
