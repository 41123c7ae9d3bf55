"""What a MeKi model is, offline: configurations, the PyTorch reference, training, folding and export to packages.

Running a package needs nothing of this but the configurations; the rest needs `pip install 'meki[models]'`.
"""
