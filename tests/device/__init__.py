"""Law 11: one device. Nothing makes a tensor elsewhere than where its inputs are."""
