"""Publishing an export on the Hub: checked first, uploaded in one go, compared afterwards."""
