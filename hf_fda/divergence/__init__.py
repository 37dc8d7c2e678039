"""Coefficients of task vectors learnt from unlabelled rows: DivMerge and AdaMerging."""
