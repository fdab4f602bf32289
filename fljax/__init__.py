"""fljax: federated learning under backdoor attack, and its cleansing, in JAX.

Importing the package is cheap: nothing here imports JAX, TensorFlow Datasets
or matplotlib. The modules are the interface; see README.md for a tour.
"""

__version__ = "0.1.0"
