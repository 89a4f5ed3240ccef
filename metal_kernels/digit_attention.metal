// One threadgroup: SIMD_GROUPS SIMD-groups over one split, for HEADS query heads of one kv head. The first split is sinks and
// tail, every other one some tiles of 128 rows of one bucket: so a split has rows of one kind.
// A SIMD-group takes TOKENS rows at a time. Of packed rows its lane owns bytes lane, lane + 32, ..: a digit is masked, not
// shifted, and serves all heads. Of unquantized rows it owns neighbouring dims.
// Keys are not put together: the threadgroup turns its queries into the basis, and a lane takes what its digits need of them
// for each tile. Sums of values stay sums of digits, in units of their tile; the merge turns them back, once a head.
// A row of `parts` is a head's: of each split its sums, maximum and total, then the scores of the tail.
constexpr int K_PER = D <= 32 ? 1 : D <= 64 ? 2 : D <= 128 ? 4 : 8;
constexpr int V_PER = DV <= 32 ? 1 : DV <= 64 ? 2 : DV <= 128 ? 4 : 8;
constexpr int K_OWN = K_PER > 4 * K_BYTES ? K_PER : 4 * K_BYTES, V_OWN = V_PER > 4 * V_BYTES ? V_PER : 4 * V_BYTES;
constexpr uint TILE = 128, TOKENS = 4, ROOM = HEADS == 1 ? 1 : HEADS == 2 ? 2 : HEADS <= 4 ? 4 : 8, SCORES = ROOM * TOKENS;
constexpr uint PIECES = 32 * SIMD_GROUPS / D, TURN = PIECES * D;  // threads that turn queries, and floats of a turned one
threadgroup float turned[HEADS * TURN], common[HEADS], shared[SIMD_GROUPS * 128];
threadgroup float part_top[SIMD_GROUPS * HEADS], part_sum[SIMD_GROUPS * HEADS];
uint index = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup;
uint split = threadgroup_position_in_grid.y, kv_heads = sizes[11], heads = kv_heads * GROUP;
uint passes = (GROUP + HEADS - 1) / HEADS;
uint pass = threadgroup_position_in_grid.z % passes, kv_row = threadgroup_position_in_grid.z / passes;
uint batch = kv_row / kv_heads, first = (kv_row % kv_heads) * GROUP + pass * HEADS;
uint count = metal::min(uint(HEADS), GROUP - pass * HEADS);  // heads from `count` on repeat the last and write nothing
uint own_head = metal::min(lane / TOKENS % ROOM, uint(HEADS) - 1);  // whose score the lane ends with
uint sink_rows = sizes[9], tail_room = sizes[10], tail_rows = newest[0], per = sizes[12];

// Which split this is: `from` is where its sums start in a row of parts, `width` where scores do.
bool raw = split == 0;
uint bucket = 0, tile = 0, tile_stop = 1, from = 0, width = DV + 2, before = 1;
uint k_digits = 0, v_digits = 0, k_first = 0, v_first = 0, k_most = 0, v_most = 0;
for (uint b = 0; b < 3; b++) {
  uint tiles = (uint(sizes[b]) + TILE - 1) / TILE, splits = (tiles + per - 1) / per, sums = 4 * uint(sizes[6 + b]) + 2;
  if (split >= before && split < before + splits) {
    bucket = b;
    tile = (split - before) * per;
    tile_stop = metal::min(tiles, tile + per);
    from = width + (split - before) * sums;
    k_first = k_digits;
    v_first = v_digits;
  }
  before += splits;
  width += splits * sums;
  k_digits += 4 * uint(sizes[3 + b]);
  v_digits += 4 * uint(sizes[6 + b]);
  k_most = metal::max(k_most, 4 * uint(sizes[3 + b]));
  v_most = metal::max(v_most, 4 * uint(sizes[6 + b]));
}
size_t stride = size_t(width) + tail_rows;
uint rows = sizes[bucket], k_width = sizes[3 + bucket], v_width = sizes[6 + bucket];
uint tile_start = tile, all_tiles = (rows + TILE - 1) / TILE;
auto k_codes = (bucket == 0 ? k_a : bucket == 1 ? k_b : k_c) + size_t(kv_row) * rows * k_width;
auto v_codes = (bucket == 0 ? v_a : bucket == 1 ? v_b : v_c) + size_t(kv_row) * rows * v_width;
auto k_scales = (bucket == 0 ? k_scales_a : bucket == 1 ? k_scales_b : k_scales_c) + size_t(kv_row) * all_tiles * D;
auto v_scales = (bucket == 0 ? v_scales_a : bucket == 1 ? v_scales_b : v_scales_c) + size_t(kv_row) * all_tiles * DV;
auto k_channels = k_order + size_t(kv_row) * k_most;
auto v_channels = v_order + size_t(kv_row) * v_most;
auto k_counts = k_place + size_t(kv_row) * k_digits + k_first;
auto v_counts = v_place + size_t(kv_row) * v_digits + v_first;

float query[HEADS][K_OWN], sums[HEADS][V_OWN];
#pragma clang loop unroll(full)
for (uint h = 0; h < HEADS; h++) {
  uint row = (batch * heads + first + metal::min(h, count - 1)) * D;
#pragma clang loop unroll(full)
  for (uint i = 0; i < K_OWN; i++) {
    uint d = lane * K_PER + i;
    query[h][i] = raw && i < K_PER && d < D ? float(queries[row + d]) * scale[0] : 0.0f;
  }
#pragma clang loop unroll(full)
  for (uint i = 0; i < V_OWN; i++) {
    sums[h][i] = 0.0f;
  }
}
if (!raw) {
  uint d = index % D, piece = index / D;
  if (piece < PIECES) {
    float turning[HEADS] = {0.0f};
    for (uint c = piece; c < D; c += PIECES) {
      float direction = float(k_basis[(size_t(kv_row) * D + c) * D + d]);
#pragma clang loop unroll(full)
      for (uint h = 0; h < HEADS; h++) {
        uint row = (batch * heads + first + metal::min(h, count - 1)) * D;
        turning[h] = metal::fma(float(queries[row + c]), direction, turning[h]);
      }
    }
#pragma clang loop unroll(full)
    for (uint h = 0; h < HEADS; h++) {
      turned[h * TURN + index] = turning[h] * (scale[0] / UNIT);
    }
  }
  if (part < HEADS) {
    uint row = (batch * heads + first + metal::min(part, count - 1)) * D;
    float sum = 0.0f;
    for (uint i = lane; i < D; i += 32) {
      sum = metal::fma(float(queries[row + i]), float(k_mean[kv_row * D + i]), sum);
    }
    sum = simd_sum(sum);
    if (lane == 0) {
      common[part] = sum * scale[0];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = index; PIECES > 1 && i < HEADS * D; i += 32 * SIMD_GROUPS) {
    uint at = i / D * TURN + i % D;
    float sum = turned[at];
    for (uint p = 1; p < PIECES; p++) {
      sum += turned[at + p * D];
    }
    turned[at] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

float top = -3.4e38f, total = 0.0f, held = 0.0f;  // finite: a row that is not there (-inf) then weighs 0, not exp(-inf + inf)
if (LOGITS && raw && part == 0) {  // once a head: as a token whose value is 0
  float logit = float(logits[first + metal::min(own_head, count - 1)]);
  top = metal::max(top, logit);
  total = lane % TOKENS == 0 ? metal::exp(logit - top) : 0.0f;
}
uint sink_blocks = (sink_rows + TOKENS - 1) / TOKENS, raw_blocks = sink_blocks + (tail_rows + TOKENS - 1) / TOKENS;
for (; tile < tile_stop; tile++) {
  float low = 0.0f;  // what the lane's head adds to its score of every row
  if (!raw) {
    float middle[HEADS] = {0.0f};
#pragma clang loop unroll(full)
    for (uint i = 0; i < 4 * K_BYTES; i++) {
      uint byte = lane + i / 4 * 32, digit = i % 4 * k_width + byte;
      if (byte < k_width) {
        uint channel = k_channels[digit];
        float unit = float(k_counts[digit]) * metal::exp2((float(k_scales[tile * D + channel]) - 128.0f) * 0.125f);
#pragma clang loop unroll(full)
        for (uint h = 0; h < HEADS; h++) {
          query[h][i] = turned[h * TURN + channel] * unit;
          middle[h] = metal::fma(query[h][i], 1.5f * float(1u << i % 4 * 2), middle[h]);
        }
      }
    }
#pragma clang loop unroll(full)
    for (uint h = 0; h < HEADS; h++) {
      float sum = metal::simd_sum(middle[h]);
      low = own_head == h ? common[h] - sum : low;
    }
  }
  uint tile_rows = metal::min(TILE, rows - metal::min(rows, tile * TILE));
  uint blocks = raw ? raw_blocks : (tile_rows + TOKENS - 1) / TOKENS;
  for (uint block = part; block < blocks; block += SIMD_GROUPS) {
    bool sink = raw && block < sink_blocks;
    uint token = TOKENS * (raw && !sink ? block - sink_blocks : block);
    uint here = sink ? sink_rows : raw ? tail_rows : tile_rows;
    float score[SCORES] = {0.0f};
    if (raw) {
      auto k_rows = (sink ? sinks_k : tail_k) + size_t(kv_row) * (sink ? sink_rows : tail_room) * D;
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        uint row = metal::min(token + t, here - 1) * D;
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
      uint codes[TOKENS][K_BYTES];
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        uint row = (tile * TILE + metal::min(token + t, here - 1)) * k_width;
#pragma clang loop unroll(full)
        for (uint j = 0; j < K_BYTES; j++) {
          codes[t][j] = lane + 32 * j < k_width ? k_codes[row + lane + 32 * j] : 0;
        }
      }
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
#pragma clang loop unroll(full)
        for (uint i = 0; i < 4 * K_BYTES; i++) {
          float digit = float(codes[t][i / 4] & (3u << i % 4 * 2));
#pragma clang loop unroll(full)
          for (uint h = 0; h < HEADS; h++) {
            score[h * TOKENS + t] = metal::fma(query[h][i], digit, score[h * TOKENS + t]);
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
    own_score += low;
    uint own_token = token + lane % TOKENS;
    if (own_token >= here) {
      own_score = -INFINITY;
    } else if (raw && !sink && lane < TOKENS * count) {
      parts[(size_t(batch) * heads + first + lane / TOKENS) * stride + width + own_token] = own_score;
    }
    float most = metal::max(own_score, metal::simd_shuffle_xor(own_score, 1));
    most = metal::max(top, metal::max(most, metal::simd_shuffle_xor(most, 2)));
    float keep = metal::exp(top - most), weight = metal::exp(own_score - most);
    top = most;
    total = total * keep + weight;
    held = held * keep + weight;
    float weights[HEADS][TOKENS];
#pragma clang loop unroll(full)
    for (uint h = 0; h < HEADS; h++) {
      float kept = metal::simd_shuffle(keep, h * TOKENS);
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        weights[h][t] = metal::simd_shuffle(weight, h * TOKENS + t);
      }
#pragma clang loop unroll(full)
      for (uint i = 0; i < V_OWN; i++) {
        sums[h][i] *= kept;
      }
    }
    if (raw) {
      auto v_rows = (sink ? sinks_v : tail_v) + size_t(kv_row) * (sink ? sink_rows : tail_room) * DV;
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        uint row = metal::min(token + t, here - 1) * DV;
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
      uint codes[TOKENS][V_BYTES];
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
        uint row = (tile * TILE + metal::min(token + t, here - 1)) * v_width;
#pragma clang loop unroll(full)
        for (uint j = 0; j < V_BYTES; j++) {
          codes[t][j] = lane + 32 * j < v_width ? v_codes[row + lane + 32 * j] : 0;
        }
      }
#pragma clang loop unroll(full)
      for (uint t = 0; t < TOKENS; t++) {
#pragma clang loop unroll(full)
        for (uint i = 0; i < 4 * V_BYTES; i++) {
          float digit = float(codes[t][i / 4] & (3u << i % 4 * 2));
#pragma clang loop unroll(full)
          for (uint h = 0; h < HEADS; h++) {
            sums[h][i] = metal::fma(weights[h][t], digit, sums[h][i]);
          }
        }
      }
    }
  }
  if (!raw) {
    // The middles of the digits are taken off, and the sums go on in units of the next tile, at last in their own.
    held += metal::simd_shuffle_xor(held, 1);
    held += metal::simd_shuffle_xor(held, 2);
    float weighed[HEADS];
#pragma clang loop unroll(full)
    for (uint h = 0; h < HEADS; h++) {
      weighed[h] = metal::simd_shuffle(held, h * TOKENS);
    }
    held = 0.0f;
    bool last = tile + 1 == tile_stop;
#pragma clang loop unroll(full)
    for (uint i = 0; i < 4 * V_BYTES; i++) {
      uint byte = lane + i / 4 * 32, digit = i % 4 * v_width + byte;
      if (byte < v_width) {
        uint at = tile * DV + v_channels[digit];
        float next = last ? 128.0f : float(v_scales[at + DV]);
        float unit = metal::exp2((float(v_scales[at]) - next) * 0.125f) * (last ? float(v_counts[digit]) : 1.0f);
#pragma clang loop unroll(full)
        for (uint h = 0; h < HEADS; h++) {
          sums[h][i] = metal::fma(weighed[h], -1.5f * float(1u << i % 4 * 2), sums[h][i]) * unit;
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
  size_t to = (size_t(batch) * heads + first + h) * stride + from;
#pragma clang loop unroll(full)
  for (uint j = 0; j < V_OWN; j += 4) {  // 4 sums of each lane at a time
#pragma clang loop unroll(full)
    for (uint i = 0; i < 4; i++) {
      shared[part * 128 + i * 32 + lane] = j + i < V_OWN ? sums[h][j + i] : 0.0f;
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
    if (index < 128 && h < count) {
      float merged = 0.0f;
      for (uint p = 0; p < SIMD_GROUPS; p++) {
        merged += shares[p] * shared[p * 128 + index];
      }
      uint i = j + index / 32, byte = lane + j / 4 * 32, d = lane * V_PER + i;
      if (raw && i < V_PER && d < DV) {
        parts[to + d] = merged;
      } else if (!raw && byte < v_width) {
        parts[to + index / 32 * v_width + byte] = merged;
      }
    }
    if (j == 0 && index < 2 && h < count) {
      parts[to + (raw ? DV : 4 * v_width) + index] = index == 1 ? sum : most;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the next sums write over these
  }
}
