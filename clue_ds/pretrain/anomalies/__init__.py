"""Steps that are not like the others: a gradient that is not finite, a loss far above the rest."""
