"""Pictures of simulated runs, sweeps and experiments. Needs matplotlib: `pip install 'mini-vllm[plots]'`.

Every function makes a `Picture`: a figure with its title and one sentence on how to read it. Nothing is shown, nothing
is global: figures are matplotlib's own objects, never pyplot's, and settings hold only while one is drawn or saved.
"""
