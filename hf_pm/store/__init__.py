"""Files that must survive: ledger, results, tensor files, locks; and the rules of the places they go to."""
