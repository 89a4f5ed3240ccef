// One thread a token (x) of one sketch (y): it reads its counter in each of DEPTH rows, sorted as they come.
uint t = thread_position_in_grid.x;
uint sketch = thread_position_in_grid.y;
uint width = counters_shape[2], tokens = keys_shape[1];
uint key = keys[(keys_shape[0] == 1 ? 0 : sketch * tokens) + t];

float rows[DEPTH];
for (uint row = 0; row < DEPTH; row++) {
  uint column = mersenne_hash(hashes[4 * row], hashes[4 * row + 1], key) % width;
  bool minus = SIGNED && (mersenne_hash(hashes[4 * row + 2], hashes[4 * row + 3], key) & 1) != 0;
  float value = counters[(sketch * DEPTH + row) * width + column];
  rows[row] = minus ? -value : value;
  // Fixed bounds, no index that depends on values: the array stays in registers.
  for (uint at = row; at > 0; at--) {
    float low = metal::min(rows[at - 1], rows[at]);
    rows[at] = metal::max(rows[at - 1], rows[at]);
    rows[at - 1] = low;
  }
}
estimates[sketch * tokens + t] = SIGNED ? (rows[(DEPTH - 1) / 2] + rows[DEPTH / 2]) * 0.5f : rows[0];
