"""Which method to merge with: facts about the task vectors, rules from measured tables, and a trial of a short list."""
