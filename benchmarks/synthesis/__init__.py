"""What the choices in synthesis are worth, and how realistic labels are."""
