"""What will it take? A planner of arithmetic alone, and a simulator that drives the engine's own scheduler.

Nothing here imports torch, except where a machine is measured.
"""
