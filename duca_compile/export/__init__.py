"""Where variants become engines of other runtimes, one backend per file. There is none yet: see README, Limits."""
