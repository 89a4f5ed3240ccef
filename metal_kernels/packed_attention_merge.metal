// One threadgroup merges the splits of one query head: each is its sums, then its maximum and its total. A SIMD-group takes
// every SIMD_GROUPS-th split, a lane every 32nd dim; the first SIMD-group rotates the merged row back.
constexpr int STEPS = (DV + 31) / 32, ODD = DV / (DV & -DV);
threadgroup float shared[SIMD_GROUPS * DV];
uint lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup;
uint splits = partials_shape[2], row = threadgroup_position_in_grid.y;
auto rows = partials + size_t(row) * splits * (DV + 2);
float most = -3.4e38f, total = 0.0f, sums[STEPS] = {0.0f};
for (uint s = lane; s < splits; s += 32) {
  most = metal::max(most, rows[s * (DV + 2) + DV]);
}
most = simd_max(most);
for (uint s = lane; s < splits; s += 32) {
  total += metal::exp(rows[s * (DV + 2) + DV] - most) * rows[s * (DV + 2) + DV + 1];
}
total = simd_sum(total);
for (uint s = part; s < splits; s += SIMD_GROUPS) {
  float share = metal::exp(rows[s * (DV + 2) + DV] - most);
#pragma clang loop unroll(full)
  for (uint j = 0; j < STEPS; j++) {
    if (DV % 32 == 0 || lane + 32 * j < DV) {
      sums[j] = metal::fma(share, rows[s * (DV + 2) + lane + 32 * j], sums[j]);
    }
  }
}
#pragma clang loop unroll(full)
for (uint j = 0; j < STEPS; j++) {
  if (DV % 32 == 0 || lane + 32 * j < DV) {
    shared[part * DV + lane + 32 * j] = sums[j];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint d = thread_index_in_threadgroup; d < DV; d += 32 * SIMD_GROUPS) {
  float merged = 0.0f;
  for (uint p = 0; p < SIMD_GROUPS; p++) {
    merged += shared[p * DV + d];
  }
  merged /= total == 0.0f ? 1.0f : total;
  if (V_TURNED) {
    shared[d] = merged;  // nobody else reads this column
  } else {
    out[size_t(row) * DV + d] = OUT(merged);
  }
}
if (V_TURNED) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (part == 0) {
    hadamard<DV, ODD>(&shared[0], lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint d = thread_index_in_threadgroup; d < DV; d += 32 * SIMD_GROUPS) {
    float turned_back = 0.0f;
    for (uint c = 0; c < ODD; c++) {
      turned_back = metal::fma(shared[d - d % ODD + c], v_turn[d * ODD + c], turned_back);
    }
    out[size_t(row) * DV + d] = OUT(turned_back);
  }
}
