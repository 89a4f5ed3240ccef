// The first threadgroups merge the splits of one query head each; the others sum the attention that its query heads give to
// the tail of one kv head. Sums of digits are turned back from the basis here, a SIMD-group for each dim.
threadgroup float digits[128 * V_BYTES], head_top[GROUP], head_total[GROUP];
uint index = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup;
uint place = threadgroup_position_in_grid.y, heads = threadgroups_per_grid.y / (GROUP + 1) * GROUP;  // of all batch rows
bool merges = place < heads;
uint kv_row = merges ? place / GROUP : place - heads, first = merges ? place : kv_row * GROUP;
uint tail_rows = newest[0], per = sizes[12];
uint start[3], splits[3], bytes[3], width = DV + 2, most_digits = 0;
#pragma clang loop unroll(full)
for (uint b = 0; b < 3; b++) {
  start[b] = width;
  bytes[b] = sizes[6 + b];
  splits[b] = ((uint(sizes[b]) + 127) / 128 + per - 1) / per;
  width += splits[b] * (4 * bytes[b] + 2);
  most_digits = metal::max(most_digits, 4 * bytes[b]);
}
size_t stride = size_t(width) + tail_rows;
for (uint h = part; h < (merges ? 1 : GROUP); h += SIMD_GROUPS) {
  auto row = parts + (first + h) * stride;
  float top = row[DV];
#pragma clang loop unroll(full)
  for (uint b = 0; b < 3; b++) {
    for (uint s = lane; s < splits[b]; s += 32) {
      top = metal::max(top, row[start[b] + s * (4 * bytes[b] + 2) + 4 * bytes[b]]);
    }
  }
  top = simd_max(top);
  float total = lane == 0 ? metal::exp(row[DV] - top) * row[DV + 1] : 0.0f;
#pragma clang loop unroll(full)
  for (uint b = 0; b < 3; b++) {
    for (uint s = lane; s < splits[b]; s += 32) {
      uint at = start[b] + s * (4 * bytes[b] + 2) + 4 * bytes[b];
      total += metal::exp(row[at] - top) * row[at + 1];
    }
  }
  total = simd_sum(total);
  if (lane == 0) {
    head_top[h] = top;
    head_total[h] = total == 0.0f ? 1.0f : total;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (merges) {
  auto row = parts + place * stride;
  float top = head_top[0], raw = metal::exp(row[DV] - top);
  for (uint p = index; p < most_digits; p += 32 * SIMD_GROUPS) {
    float sum = 0.0f;
#pragma clang loop unroll(full)
    for (uint b = 0; b < 3; b++) {
      for (uint s = 0; s < splits[b] && p < 4 * bytes[b]; s++) {
        auto sums = row + start[b] + s * (4 * bytes[b] + 2);
        sum = metal::fma(metal::exp(sums[4 * bytes[b]] - top), sums[p], sum);
      }
    }
    digits[p] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float packed = head_total[0] - raw * row[DV + 1];
  auto channels = v_order + size_t(kv_row) * most_digits;
  for (uint d = part; d < DV; d += SIMD_GROUPS) {
    auto directions = v_basis + (size_t(kv_row) * DV + d) * DV;
    float sum = 0.0f;
    for (uint p = lane; p < most_digits; p += 32) {
      sum = metal::fma(digits[p], float(directions[channels[p]]), sum);
    }
    sum = simd_sum(sum) / UNIT;
    if (lane == 0) {
      sum = metal::fma(packed, float(v_mean[kv_row * DV + d]), metal::fma(raw, row[d], sum));
      output[size_t(place) * DV + d] = OUT(sum / head_total[0]);
    }
  }
} else {
  for (uint t = index; t < tail_rows; t += 32 * SIMD_GROUPS) {
    float sum = 0.0f;
    for (uint h = 0; h < GROUP; h++) {
      sum += metal::exp(parts[(first + h) * stride + width + t] - head_top[h]) / head_total[h];
    }
    mass[kv_row * tail_rows + t] = sum;
  }
}
