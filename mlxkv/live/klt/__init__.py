"""What the live method `klt` is made of: `tables` split bytes, `learning` finds directions, `coding` makes rows of digits."""
