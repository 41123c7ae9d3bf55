"""What a model is, offline: architectures, memories and FFNs, checkpoints, training, folding and export to packages.

Running a package needs nothing of this, and nothing that does imports it. It needs `pip install 'meki[models]'`.
"""
