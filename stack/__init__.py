"""What is built: data, model, training, evaluation, evidence and the museum of planted bugs."""

__version__ = "0.1.0"
