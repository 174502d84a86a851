"""Mixed precision: what each layer's bits cost the predictions, and where bits are best spent."""
