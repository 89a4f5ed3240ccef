"""Files damaged or forged at random: recipes (`strategies`), what they make (`formats`, `mutations`), limits (`guard`)."""
