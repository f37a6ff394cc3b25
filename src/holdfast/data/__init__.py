"""Where images come from: one reader a format, and the values that every reader returns."""
