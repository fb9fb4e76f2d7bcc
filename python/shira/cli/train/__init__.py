"""What `shira train` does: a Hugging Face model folder and a file of text become an adapter and its training curve."""
