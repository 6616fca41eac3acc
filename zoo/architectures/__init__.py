"""One file per architecture; the registry imports each of them."""
