"""f: from states of one layer, or of one model, to states for another."""
