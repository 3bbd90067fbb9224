"""The Inductor backend; ``private`` holds every use of torch's private API that compiling needs."""
