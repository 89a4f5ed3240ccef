"""Parts of the live method `klt`: `tables` split bytes, `learning` finds directions, `coding` makes rows of digits."""
