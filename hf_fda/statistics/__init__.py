"""What closed-form merges have to know of a source on its rows: inputs of linear layers, importance of entries."""
