"""Export to and import from Hugging Face, compared with the computation of transformers."""
