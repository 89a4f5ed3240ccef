// A threadgroup owns 32 tokens of one clustering (y), each of its 8 SIMD-groups 4 of them, each lane every 32nd
// centroid. It walks over tiles of 32 centroids x 32 dims in threadgroup memory, which all its tokens share, and
// reduces over lanes once, at the end. All threads reach all barriers; what lies past an edge is zero.
threadgroup float token_tile[32 * 32];
threadgroup float centroid_tile[32 * 33];  // 33: lanes read one dim of 32 centroids from 32 banks

uint lane = thread_index_in_simdgroup;
uint mine = simdgroup_index_in_threadgroup * 4;  // first of this SIMD-group's 4 rows in both tiles
uint n = threadgroup_position_in_grid.y;
uint tokens = x_shape[1], dims = x_shape[2], clusters = directions_shape[1];
uint first = threadgroup_position_in_grid.x * 32;

float best_of[4];
uint nearest_of[4];
for (uint k = 0; k < 4; k++) {
  best_of[k] = -INFINITY;
  nearest_of[k] = clusters;
}

for (uint start = 0; start < clusters; start += 32) {
  float dots[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (uint from = 0; from < dims; from += 32) {
    uint d = from + lane;
    for (uint row = mine; row < mine + 4; row++) {
      uint t = first + row, c = start + row;
      token_tile[row * 32 + lane] = t < tokens && d < dims ? float(x[(size_t(n) * tokens + t) * dims + d]) : 0.0f;
      centroid_tile[row * 33 + lane] = c < clusters && d < dims ? directions[(size_t(n) * clusters + c) * dims + d] : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (first + mine < tokens) {  // with a single token, seven SIMD-groups only load
      for (uint i = 0; i < 32; i++) {
        float value = centroid_tile[lane * 33 + i];
        for (uint k = 0; k < 4; k++) {
          dots[k] = metal::fma(token_tile[(mine + k) * 32 + i], value, dots[k]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  uint c = start + lane;
  if (c < clusters) {
    for (uint k = 0; k < 4; k++) {
      float score = dots[k] + offsets[n * clusters + c];
      if (score > best_of[k]) {
        best_of[k] = score;
        nearest_of[k] = c;
      }
    }
  }
}

for (uint k = 0; k < 4; k++) {
  float top = metal::simd_max(best_of[k]);
  uint winner = metal::simd_min(best_of[k] == top ? nearest_of[k] : clusters);
  uint t = first + mine + k;
  if (lane == 0 && t < tokens) {
    nearest[n * tokens + t] = winner == clusters ? -1 : int(winner);
  }
}
