"""Pure leaves: functions on tensors that attacks share; they know no attack."""
