"""The models, against transformers and against independent reimplementations."""
