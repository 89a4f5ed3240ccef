// One thread a token (x), row of the sketch (y) and sketch (z): it hashes its key and adds its amount to one counter.
// Keys and amounts are read side by side; the additions scatter, on average tokens / width of them on one counter.
uint t = thread_position_in_grid.x;
uint row = thread_position_in_grid.y;
uint sketch = thread_position_in_grid.z;
uint depth = hashes_shape[0], tokens = keys_shape[1];
uint key = keys[(keys_shape[0] == 1 ? 0 : sketch * tokens) + t];

uint column = mersenne_hash(hashes[4 * row], hashes[4 * row + 1], key) % width;
bool minus = SIGNED && (mersenne_hash(hashes[4 * row + 2], hashes[4 * row + 3], key) & 1) != 0;
float amount = amounts[sketch * tokens + t];
uint at = (sketch * depth + row) * width + column;
atomic_fetch_add_explicit(&added[at], minus ? -amount : amount, memory_order_relaxed);
