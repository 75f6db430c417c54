"""How gates are decided. Checks receive what they judge as arguments and never import the stack."""
