// One threadgroup: SIMD_GROUPS SIMD-groups over one split of the tokens, for HEADS query heads of one kv head. A
// SIMD-group takes TOKENS tokens at a time; a lane owns K_PER neighbouring dims of keys and V_PER of values, so that its
// codes of a token are mostly in one word, and a value that is decoded in registers serves all heads.
// The lanes' parts of the TOKENS * HEADS scores are summed so that each lane ends with one score: so a maximum, two exp
// and a total are one lane's work for its head and token, not every lane's for all.
// Sinks and tail are not rotated, packed tokens may be. A SIMD-group attends to the former first, with queries as they are.
// Before the packed tokens it takes rotated queries, and rotates its sums: once, so that no register is kept twice.
constexpr int K_PER = D <= 32 ? 1 : D <= 64 ? 2 : D <= 128 ? 4 : 8;
constexpr int V_PER = DV <= 32 ? 1 : DV <= 64 ? 2 : DV <= 128 ? 4 : 8;
constexpr bool K_WORD = D % K_PER == 0 && 32 % (K_PER * K_BITS) == 0;  // a lane's codes are in one word
constexpr bool V_WORD = DV % V_PER == 0 && 32 % (V_PER * V_BITS) == 0;
constexpr bool SINKS = PARTS & 1, PACKED = PARTS & 2, TAIL = PARTS & 4, LENGTHS = PARTS & 8, BIAS = PARTS & 16;
constexpr bool LOGITS = PARTS & 32, K_TURNED = PARTS & 64, V_TURNED = PARTS & 128, WHOLE = PARTS & 256;
constexpr int K_ODD = D / (D & -D), V_ODD = DV / (DV & -DV);  // a rotation is a Hadamard matrix times one of this size
constexpr uint TOKENS = 4, ROOM = HEADS == 1 ? 1 : HEADS == 2 ? 2 : HEADS <= 4 ? 4 : 8, SCORES = ROOM * TOKENS;
threadgroup float shared[SIMD_GROUPS * DV], turned[K_TURNED ? HEADS * D : 1];
threadgroup float part_top[SIMD_GROUPS * HEADS], part_sum[SIMD_GROUPS * HEADS];
uint lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup;
uint split = threadgroup_position_in_grid.y, splits = threadgroups_per_grid.y;
uint heads = queries_shape[1], kv_heads = heads / GROUP, passes = (GROUP + HEADS - 1) / HEADS;
uint pass = threadgroup_position_in_grid.z % passes, kv_row = threadgroup_position_in_grid.z / passes;
uint batch = kv_row / kv_heads, first = (kv_row % kv_heads) * GROUP + pass * HEADS;
uint count = metal::min(uint(HEADS), GROUP - pass * HEADS);  // heads from `count` on repeat the last and write nothing
uint own_head = first + metal::min(lane / TOKENS % ROOM, count - 1);  // whose score the lane ends with

uint sink_rows = SINKS ? sinks_k_shape[2] : 0, packed_rows = PACKED ? k_shape[2] : 0;
uint tail_room = TAIL ? tail_k_shape[2] : 0, tail_rows = tail_room;
if (LENGTHS) {
  tail_rows = uint(metal::clamp(int(lengths[batch]), 0, int(tail_room)));
}
uint columns = sink_rows + packed_rows + tail_room;
// Blocks of TOKENS tokens: those of the sinks, of the tail, then the packed ones.
uint sink_blocks = (sink_rows + TOKENS - 1) / TOKENS, raw_blocks = sink_blocks + (tail_rows + TOKENS - 1) / TOKENS;
uint blocks = raw_blocks + (packed_rows + TOKENS - 1) / TOKENS, share = (blocks + splits - 1) / splits;
uint start = metal::min(blocks, split * share), stop = metal::min(blocks, start + share);

if (K_TURNED) {
  for (uint h = part; h < HEADS; h += SIMD_GROUPS) {
    uint row = (batch * heads + first + metal::min(h, count - 1)) * D;
    for (uint d = lane; d < D; d += 32) {
      float sum = 0.0f;
      for (uint c = 0; c < K_ODD; c++) {
        uint from = d - d % K_ODD + c;
        sum = metal::fma(float(queries[row + from]) * scale[0], k_turn[from * K_ODD + d % K_ODD], sum);
      }
      turned[h * D + d] = sum;
    }
    hadamard<D, K_ODD>(&turned[h * D], lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

float query[HEADS][K_PER], sums[HEADS][V_PER];
#pragma clang loop unroll(full)
for (uint h = 0; h < HEADS; h++) {
#pragma clang loop unroll(full)
  for (uint i = 0; i < V_PER; i++) {
    sums[h][i] = 0.0f;
  }
}
float top = -3.4e38f, total = 0.0f;  // finite: a masked token (-inf) then weighs exp(-inf) = 0, not exp(-inf + inf)
if (LOGITS && split == 0 && part == 0) {  // once a head: as a token whose value is 0
  float logit = float(logits[own_head]);
  top = metal::max(top, logit);
  total = lane % TOKENS == 0 ? metal::exp(logit - top) : 0.0f;
}

#pragma clang loop unroll(disable)
for (uint kind = 0; kind < (PACKED ? 2 : 1); kind++) {
  bool raw = kind == 0;
#pragma clang loop unroll(full)
  for (uint h = 0; h < HEADS; h++) {
    uint row = (batch * heads + first + metal::min(h, count - 1)) * D;
#pragma clang loop unroll(full)
    for (uint i = 0; i < K_PER; i++) {
      uint d = lane * K_PER + i;
      query[h][i] = 0.0f;
      if (D == 32 * K_PER || d < D) {
        query[h][i] = K_TURNED && !raw ? turned[h * D + d] : float(queries[row + d]) * scale[0];
      }
    }
    if (V_TURNED && !raw && start < raw_blocks) {
      threadgroup float* own = &shared[part * DV];
#pragma clang loop unroll(full)
      for (uint i = 0; i < V_PER; i++) {
        if (DV == 32 * V_PER || lane * V_PER + i < DV) {
          own[lane * V_PER + i] = sums[h][i];
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
      for (uint i = 0; i < V_PER; i++) {
        uint d = lane * V_PER + i;
        sums[h][i] = 0.0f;
        for (uint c = 0; c < V_ODD && d < DV; c++) {
          uint from = d - d % V_ODD + c;
          sums[h][i] = metal::fma(own[from], v_turn[from * V_ODD + d % V_ODD], sums[h][i]);
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
      for (uint i = 0; i < V_PER; i++) {
        if (DV == 32 * V_PER || lane * V_PER + i < DV) {
          own[lane * V_PER + i] = sums[h][i];
        }
      }
      hadamard<DV, V_ODD>(own, lane);
#pragma clang loop unroll(full)
      for (uint i = 0; i < V_PER; i++) {
        if (DV == 32 * V_PER || lane * V_PER + i < DV) {
          sums[h][i] = own[lane * V_PER + i];
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  uint end = raw ? metal::min(stop, raw_blocks) : stop;
  for (uint block = (raw ? start : metal::max(start, raw_blocks)) + part; block < end; block += SIMD_GROUPS) {
    bool sink = raw && block < sink_blocks;
    uint token = TOKENS * (sink ? block : block - (raw ? sink_blocks : raw_blocks));
    uint rows = sink ? sink_rows : raw ? tail_rows : packed_rows;
    float score[SCORES] = {0.0f};
    if (raw) {
      auto k_rows = (sink ? sinks_k : tail_k) + size_t(kv_row) * (sink ? sink_rows : tail_room) * D;
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        uint row = metal::min(token + t, rows - 1) * D;
#pragma clang loop unroll(full)
        for (uint i = 0; i < K_PER; i++) {
          if (D == 32 * K_PER || lane * K_PER + i < D) {
            float value = float(k_rows[row + lane * K_PER + i]);
#pragma clang loop unroll(full)
            for (uint h = 0; h < HEADS; h++) {
              score[h * TOKENS + t] = metal::fma(query[h][i], value, score[h * TOKENS + t]);
            }
          }
        }
      }
    } else {
      float step[K_PER] = {0.0f}, low[K_PER] = {0.0f};
      auto k_rows = k + size_t(kv_row) * packed_rows * k_shape[3];  // of the row, so that indices below are 32-bit
      size_t k_tiles = size_t(kv_row) * k_scale_shape[2] * k_scale_shape[3];
      auto k_steps = k_scale + k_tiles, k_lows = k_shift + k_tiles;
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        uint at = metal::min(token + t, rows - 1);
        auto words = k_rows + at * k_shape[3];
        uint tiles = at / K_TOKENS * k_scale_shape[3];
        uint word = 0;
        if (K_WORD && (D == 32 * K_PER || lane * K_PER < D)) {
          word = words[lane * K_PER * K_BITS / 32] >> (lane * K_PER * K_BITS % 32);
        }
#pragma clang loop unroll(full)
        for (uint i = 0; i < K_PER; i++) {
          uint d = lane * K_PER + i;
          if (D == 32 * K_PER || d < D) {
            if (t == 0 || K_TOKENS % TOKENS != 0) {  // else the tokens share their tile
              bool same = i > 0 && K_DIMS % K_PER == 0;
              step[i] = same ? step[0] : float(k_steps[tiles + d / K_DIMS]);
              low[i] = same ? low[0] : float(k_lows[tiles + d / K_DIMS]);
            }
            uint code = K_WORD ? (word >> (i * K_BITS % 32)) & ((1u << K_BITS) - 1) : read_bits(words, d, K_BITS);
            float value = metal::fma(step[i], float(code), low[i]);
#pragma clang loop unroll(full)
            for (uint h = 0; h < HEADS; h++) {
              score[h * TOKENS + t] = metal::fma(query[h][i], value, score[h * TOKENS + t]);
            }
          }
        }
      }
    }
    // Each step halves the scores that a lane has a part of: lane n % SCORES ends with the sum of score n.
#pragma clang loop unroll(full)
    for (uint far = SCORES / 2; far > 0; far /= 2) {
      bool upper = (lane & far) != 0;
#pragma clang loop unroll(full)
      for (uint n = 0; n < far; n++) {
        float given = metal::simd_shuffle_xor(upper ? score[n] : score[n + far], far);
        score[n] = (upper ? score[n + far] : score[n]) + given;
      }
    }
    float own_score = score[0];
#pragma clang loop unroll(full)
    for (uint other = SCORES; other < 32; other *= 2) {
      own_score += metal::simd_shuffle_xor(own_score, other);
    }
    uint own_token = token + lane % TOKENS;
    if (own_token >= rows) {
      own_score = -INFINITY;
    } else if (BIAS) {
      uint column = own_token + (sink ? 0 : raw ? sink_rows + packed_rows : sink_rows);
      uint bias_row = batch * bias_shape[1] + own_head * bias_shape[1] / heads;
      own_score += float(bias[size_t(bias_row) * columns + column]);
    }
    float most = metal::max(own_score, metal::simd_shuffle_xor(own_score, 1));
    most = metal::max(top, metal::max(most, metal::simd_shuffle_xor(most, 2)));
    float keep = metal::exp(top - most), weight = metal::exp(own_score - most);
    top = most;
    total = total * keep + weight;
    float weights[HEADS][TOKENS];
#pragma clang loop unroll(full)
    for (uint h = 0; h < HEADS; h++) {
      float kept = metal::simd_shuffle(keep, h * TOKENS);
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        weights[h][t] = metal::simd_shuffle(weight, h * TOKENS + t);
      }
#pragma clang loop unroll(full)
      for (uint i = 0; i < V_PER; i++) {
        sums[h][i] *= kept;
      }
    }
    if (raw) {
      auto v_rows = (sink ? sinks_v : tail_v) + size_t(kv_row) * (sink ? sink_rows : tail_room) * DV;
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        uint row = metal::min(token + t, rows - 1) * DV;
#pragma clang loop unroll(full)
        for (uint i = 0; i < V_PER; i++) {
          if (DV == 32 * V_PER || lane * V_PER + i < DV) {
            float value = float(v_rows[row + lane * V_PER + i]);
#pragma clang loop unroll(full)
            for (uint h = 0; h < HEADS; h++) {
              sums[h][i] = metal::fma(weights[h][t], value, sums[h][i]);
            }
          }
        }
      }
    } else {
      float step[V_PER] = {0.0f}, low[V_PER] = {0.0f};
      auto v_rows = v + size_t(kv_row) * packed_rows * v_shape[3];  // of the row, so that indices below are 32-bit
      size_t v_tiles = size_t(kv_row) * v_scale_shape[2] * v_scale_shape[3];
      auto v_steps = v_scale + v_tiles, v_lows = v_shift + v_tiles;
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        uint at = metal::min(token + t, rows - 1);
        auto words = v_rows + at * v_shape[3];
        uint tiles = at / V_TOKENS * v_scale_shape[3];
        uint word = 0;
        if (V_WORD && (DV == 32 * V_PER || lane * V_PER < DV)) {
          word = words[lane * V_PER * V_BITS / 32] >> (lane * V_PER * V_BITS % 32);
        }
#pragma clang loop unroll(full)
        for (uint i = 0; i < V_PER; i++) {
          uint d = lane * V_PER + i;
          if (DV == 32 * V_PER || d < DV) {
            if (t == 0 || V_TOKENS % TOKENS != 0) {
              bool same = i > 0 && V_DIMS % V_PER == 0;
              step[i] = same ? step[0] : float(v_steps[tiles + d / V_DIMS]);
              low[i] = same ? low[0] : float(v_lows[tiles + d / V_DIMS]);
            }
            uint code = V_WORD ? (word >> (i * V_BITS % 32)) & ((1u << V_BITS) - 1) : read_bits(words, d, V_BITS);
            float value = metal::fma(step[i], float(code), low[i]);
#pragma clang loop unroll(full)
            for (uint h = 0; h < HEADS; h++) {
              sums[h][i] = metal::fma(weights[h][t], value, sums[h][i]);
            }
          }
        }
      }
    }
  }
}

total += metal::simd_shuffle_xor(total, 1);
total += metal::simd_shuffle_xor(total, 2);
if (lane % TOKENS == 0 && lane / TOKENS < HEADS) {
  part_top[part * HEADS + lane / TOKENS] = top;
  part_sum[part * HEADS + lane / TOKENS] = total;
}
#pragma clang loop unroll(full)
for (uint h = 0; h < HEADS; h++) {
#pragma clang loop unroll(full)
  for (uint i = 0; i < V_PER; i++) {
    if (DV == 32 * V_PER || lane * V_PER + i < DV) {
      shared[part * DV + lane * V_PER + i] = sums[h][i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float most = part_top[h], sum = 0.0f, shares[SIMD_GROUPS];
  for (uint p = 1; p < SIMD_GROUPS; p++) {
    most = metal::max(most, part_top[p * HEADS + h]);
  }
  for (uint p = 0; p < SIMD_GROUPS; p++) {
    shares[p] = metal::exp(part_top[p * HEADS + h] - most);
    sum += shares[p] * part_sum[p * HEADS + h];
  }
  size_t row = size_t(batch) * heads + first + h;
  for (uint d = thread_index_in_threadgroup; d < DV; d += 32 * SIMD_GROUPS) {
    float merged = 0.0f;
    for (uint p = 0; p < SIMD_GROUPS; p++) {
      merged += shares[p] * shared[p * DV + d];
    }
    if (WHOLE) {
      merged /= sum == 0.0f ? 1.0f : sum;
    }
    if (WHOLE && V_TURNED) {
      shared[d] = merged;  // nobody else reads this column
    } else if (h < count) {
      out[WHOLE ? row * DV + d : (row * splits + split) * (DV + 2) + d] = OUT(merged);
    }
  }
  if (!WHOLE && thread_index_in_threadgroup < 2 && h < count) {
    bool second = thread_index_in_threadgroup == 1;
    out[(row * splits + split) * (DV + 2) + DV + second] = OUT(second ? sum : most);
  }
  if (WHOLE && V_TURNED) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (part == 0) {
      hadamard<DV, V_ODD>(&shared[0], lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = thread_index_in_threadgroup; d < DV && h < count; d += 32 * SIMD_GROUPS) {
      float turned_back = 0.0f;
      for (uint c = 0; c < V_ODD; c++) {
        turned_back = metal::fma(shared[d - d % V_ODD + c], v_turn[d * V_ODD + c], turned_back);
      }
      out[row * DV + d] = OUT(turned_back);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the next head writes over this one
}
