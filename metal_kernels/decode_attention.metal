// One threadgroup: SIMD_GROUPS SIMD-groups over one split of a bucket's tokens, for HEADS query heads of one kv head.
// A SIMD-group takes every SIMD_GROUPS-th token of the split. Its lane owns dims lane, lane + 32, ..: 32 values are
// exactly BITS words, so lanes read neighbouring words at a shift that never changes, and each value that is decoded
// in registers serves HEADS heads. Queries and sums stay in registers: the caller bounds HEADS by the dims, and every
// loop over such an array is unrolled, since an index known only at run time would put it in memory. Tiles of 32, 64,
// .. dims have one scale for all lanes; per-channel scales lie side by side and come from cache for a tile's tokens.
// Only the last merge uses threadgroup memory, a head at a time. Sums are fused: nothing here is compared bit by bit.
// A row of `parts` is a head's: of each split the sums, their maximum and total, then the scores of all tokens.
constexpr int K_STEPS = (D + 31) / 32, V_STEPS = (DV + 31) / 32;
threadgroup float part_top[SIMD_GROUPS], part_sum[SIMD_GROUPS], part_out[SIMD_GROUPS * DV];
uint lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup;
uint split = threadgroup_position_in_grid.y, splits = threadgroups_per_grid.y;
uint heads = queries_shape[1], kv_heads = k_shape[1], tokens = k_shape[2], group = heads / kv_heads;
uint passes = (group + HEADS - 1) / HEADS;
uint pass = threadgroup_position_in_grid.z % passes, kv_row = threadgroup_position_in_grid.z / passes;
uint batch = kv_row / kv_heads, first = (kv_row % kv_heads) * group + pass * HEADS;
size_t width = size_t(splits) * (DV + 2) + tokens;
uint count = metal::min(uint(HEADS), group - pass * HEADS);  // heads from `count` on repeat the last and write nothing

float query[HEADS][K_STEPS], sums[HEADS][V_STEPS], top[HEADS], total[HEADS];
uint bias_row[HEADS];
#pragma clang loop unroll(full)
for (uint h = 0; h < HEADS; h++) {
  uint head = first + metal::min(h, count - 1);
#pragma clang loop unroll(full)
  for (uint j = 0; j < K_STEPS; j++) {
    uint d = lane + 32 * j;
    query[h][j] = d < D ? float(queries[(batch * heads + head) * D + d]) * scale[0] : 0.0f;
  }
#pragma clang loop unroll(full)
  for (uint j = 0; j < V_STEPS; j++) {
    sums[h][j] = 0.0f;
  }
  top[h] = -3.4e38f;  // finite: a masked token (-inf) then weighs exp(-inf) = 0, not exp(-inf + inf)
  total[h] = 0.0f;
  if (SINKS && split == 0 && part == 0) {  // once a head: as a token whose value is 0
    float sink = float(sinks[head]);
    top[h] = metal::max(top[h], sink);
    total[h] = metal::exp(sink - top[h]);
  }
  bias_row[h] = batch * bias_shape[1] + head * bias_shape[1] / heads;
}

uint stop = metal::min(tokens, (split + 1) * SPLIT_TOKENS);
for (uint t = split * SPLIT_TOKENS + part; t < stop; t += SIMD_GROUPS) {
  size_t k_row = (size_t(kv_row) * tokens + t) * k_shape[3];
  size_t k_tiles = (size_t(kv_row) * k_scale_shape[2] + t / K_TOKENS) * k_scale_shape[3];
  float score[HEADS] = {0.0f}, keep[HEADS], weight[HEADS];
#pragma clang loop unroll(full)
  for (uint j = 0; j < K_STEPS; j++) {
    if (D % 32 == 0 || lane + 32 * j < D) {
      uint code = read_bits(k + k_row + j * K_BITS, lane, K_BITS);
      float value;
      if (K_BITS < 16) {
        size_t tile = k_tiles + (K_DIMS % 32 == 0 ? 32 * j / K_DIMS : (lane + 32 * j) / K_DIMS);
        value = metal::fma(float(k_scale[tile]), float(code), float(k_shift[tile]));
      } else {
        float narrow = BFLOAT ? as_type<float>(code << 16) : float(as_type<half>(ushort(code)));
        value = K_BITS == 32 ? as_type<float>(code) : narrow;
      }
#pragma clang loop unroll(full)
      for (uint h = 0; h < HEADS; h++) {
        score[h] = metal::fma(query[h][j], value, score[h]);
      }
    }
  }
#pragma clang loop unroll(full)
  for (uint h = 0; h < HEADS; h++) {
    score[h] = simd_sum(score[h]) + (BIAS ? float(bias[size_t(bias_row[h]) * tokens + t]) : 0.0f);
    if (lane == 0 && h < count) {
      parts[(size_t(batch) * heads + first + h + 1) * width - tokens + t] = score[h];
    }
    float before = top[h];
    top[h] = metal::max(before, score[h]);
    keep[h] = metal::exp(before - top[h]);
    weight[h] = metal::exp(score[h] - top[h]);
    total[h] = total[h] * keep[h] + weight[h];
  }
  size_t v_row = (size_t(kv_row) * tokens + t) * v_shape[3];
  size_t v_tiles = (size_t(kv_row) * v_scale_shape[2] + t / V_TOKENS) * v_scale_shape[3];
#pragma clang loop unroll(full)
  for (uint j = 0; j < V_STEPS; j++) {
    if (DV % 32 == 0 || lane + 32 * j < DV) {
      uint code = read_bits(v + v_row + j * V_BITS, lane, V_BITS);
      float value;
      if (V_BITS < 16) {
        size_t tile = v_tiles + (V_DIMS % 32 == 0 ? 32 * j / V_DIMS : (lane + 32 * j) / V_DIMS);
        value = metal::fma(float(v_scale[tile]), float(code), float(v_shift[tile]));
      } else {
        float narrow = BFLOAT ? as_type<float>(code << 16) : float(as_type<half>(ushort(code)));
        value = V_BITS == 32 ? as_type<float>(code) : narrow;
      }
#pragma clang loop unroll(full)
      for (uint h = 0; h < HEADS; h++) {
        sums[h][j] = metal::fma(weight[h], value, sums[h][j] * keep[h]);
      }
    }
  }
}

#pragma clang loop unroll(full)
for (uint h = 0; h < HEADS; h++) {
  if (lane == 0) {
    part_top[part] = top[h];
    part_sum[part] = total[h];
  }
#pragma clang loop unroll(full)
  for (uint j = 0; j < V_STEPS; j++) {
    if (DV % 32 == 0 || lane + 32 * j < DV) {
      part_out[part * DV + lane + 32 * j] = sums[h][j];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float most = part_top[0];
  for (uint p = 1; p < SIMD_GROUPS; p++) {
    most = metal::max(most, part_top[p]);
  }
  float share[SIMD_GROUPS];
  for (uint p = 0; p < SIMD_GROUPS; p++) {
    share[p] = metal::exp(part_top[p] - most);
  }
  size_t row = (size_t(batch) * heads + first + h) * width + split * (DV + 2);
  for (uint d = thread_index_in_threadgroup; d < DV && h < count; d += 32 * SIMD_GROUPS) {
    float merged = 0.0f;
    for (uint p = 0; p < SIMD_GROUPS; p++) {
      merged += share[p] * part_out[p * DV + d];
    }
    parts[row + d] = merged;
  }
  if (thread_index_in_threadgroup == 0 && h < count) {
    float merged = 0.0f;
    for (uint p = 0; p < SIMD_GROUPS; p++) {
      merged += share[p] * part_sum[p];
    }
    parts[row + DV] = most;
    parts[row + DV + 1] = merged;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the next head writes over this one
}
