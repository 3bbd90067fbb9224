"""Finds the policy and the settings that meet a wish, by trying them on a model's own loops.

- ``wishes``: what is asked for, and how far a setting is from it
- ``quality``: how close a result is to the uncached one
- ``workload``: runs the calls of a pipeline or of a model with a loop
- ``measuring``: times runs, uncached and with a policy
- ``trials``: what was measured so far, on disk
- ``candidates``: the settings of all methods that fit the model, with what each must cost
- ``search``: tries the promising ones on the calls that choose, and the best on the calls that judge
- ``results``: what came out
- ``report``: the same as a page
- ``tuned``: ``Tuned``, the same as a table, a file and a page
- ``tuner``: ``tune``, which puts these together
"""
