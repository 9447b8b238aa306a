"""Client-side detection of tampered models."""
