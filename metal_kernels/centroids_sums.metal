// A SIMD-group owns one cluster (y) of one clustering (z) and 32 dims (x), one a lane. It looks at the owners of 32
// tokens at once and visits those of its cluster in order, so each sum is added in the order of tokens.
uint lane = thread_index_in_simdgroup;
uint d = thread_position_in_grid.x;
uint cluster = thread_position_in_grid.y;
uint n = thread_position_in_grid.z;
uint tokens = x_shape[1], dims = x_shape[2];
if (cluster >= clusters) {
  return;  // the whole SIMD-group leaves, and there is no barrier
}

float total = 0.0f, number = 0.0f;
for (uint start = 0; start < tokens; start += 32) {
  uint t = start + lane;
  bool mine = t < tokens && owner[n * tokens + t] == int(cluster);
  uint left = metal::simd_or(mine ? 1u << lane : 0u);
  while (left != 0) {
    uint token = n * tokens + start + metal::ctz(left);
    left &= left - 1;
    float weight = weights[token];
    number += weight;
    if (d < dims) {
      total += weight * float(x[size_t(token) * dims + d]);
    }
  }
}

if (d < dims) {
  totals[(size_t(n) * clusters + cluster) * dims + d] = total;
}
if (d == 0) {
  numbers[n * clusters + cluster] = number;
}
