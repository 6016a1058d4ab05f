"""A core beside its shell: in a process of its own, or in a thread of the same one.

`messages` is what the two say to each other, `core_loop` the side that answers, `mp_client` (a process) and
`async_core_client` (a thread) the side that asks.
"""
