"""What both front doors of the router share: requests read, tokenized, admitted, decided; answers watched; decisions shown."""
