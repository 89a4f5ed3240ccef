// The first threadgroups merge the splits of all buckets, each for a query head; the others sum, for MASS_TOKENS tokens of
// one kv head, the probabilities that its query heads give, or update the importance of the last of them, where IMPORTANCE. A SIMD-group finds maximum and total of
// every SIMD_GROUPS-th head.
// Outputs of rotated values are merged apart, rotated back by one SIMD-group, and added.
constexpr int STEPS = (DV + 31) / 32, ODD = DV / (DV & -DV);
threadgroup float shared[SIMD_GROUPS * DV], back[ROTATED ? DV : 1], head_top[GROUP], head_total[GROUP];
const device float* parts[8] = {parts0, parts1, parts2, parts3, parts4, parts5, parts6, parts7};
uint widths[8] = {uint(parts0_shape[2]), uint(parts1_shape[2]), uint(parts2_shape[2]), uint(parts3_shape[2]),
                  uint(parts4_shape[2]), uint(parts5_shape[2]), uint(parts6_shape[2]), uint(parts7_shape[2])};
uint splits[BUCKETS], columns = 0;
#pragma clang loop unroll(full)
for (uint b = 0; b < BUCKETS; b++) {
  splits[b] = (widths[b] + DV + 1 + SPLIT_TOKENS) / (DV + 2 + SPLIT_TOKENS);
  columns += widths[b] - splits[b] * (DV + 2);
}
uint lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup, place = threadgroup_position_in_grid.y;
uint heads = parts0_shape[0] * parts0_shape[1];  // of all batch rows
bool merges = place < heads;
uint kv_row = (place - heads) % (heads / GROUP), first = merges ? place : kv_row * GROUP;
for (uint h = part; h < (merges ? 1 : GROUP); h += SIMD_GROUPS) {
  float top = -3.4e38f, total = 0.0f;
#pragma clang loop unroll(full)
  for (uint b = 0; b < BUCKETS; b++) {
    auto row = parts[b] + size_t(first + h) * widths[b] + DV;
    for (uint s = lane; s < splits[b]; s += 32) {
      top = metal::max(top, row[s * (DV + 2)]);
    }
  }
  top = simd_max(top);
#pragma clang loop unroll(full)
  for (uint b = 0; b < BUCKETS; b++) {
    auto row = parts[b] + size_t(first + h) * widths[b] + DV;
    for (uint s = lane; s < splits[b]; s += 32) {
      total += metal::exp(row[s * (DV + 2)] - top) * row[s * (DV + 2) + 1];
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
  for (uint kind = ROTATED == 0 ? 1 : 0; kind < 2; kind++) {  // rotated values, then the others
    float sums[STEPS] = {0.0f};
#pragma clang loop unroll(full)
    for (uint b = 0; b < BUCKETS; b++) {
      auto row = parts[b] + size_t(place) * widths[b];
      for (uint s = part; s < splits[b] && ((ROTATED >> b) & 1) != kind; s += SIMD_GROUPS) {
        float share = metal::exp(row[s * (DV + 2) + DV] - head_top[0]);
#pragma clang loop unroll(full)
        for (uint j = 0; j < STEPS; j++) {
          if (DV % 32 == 0 || lane + 32 * j < DV) {
            sums[j] = metal::fma(share, row[s * (DV + 2) + lane + 32 * j], sums[j]);
          }
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
      float merged = kind == 1 && ROTATED != 0 ? back[d] : 0.0f;
      for (uint p = 0; p < SIMD_GROUPS; p++) {
        merged += shared[p * DV + d];
      }
      if (kind == 1) {
        output[size_t(place) * DV + d] = OUT(merged / head_total[0]);
      } else {
        shared[d] = merged;  // nobody else reads this column
      }
    }
    if (kind == 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (part == 0) {
        hadamard<DV, ODD>(&shared[0], lane);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint d = thread_index_in_threadgroup; d < DV; d += 32 * SIMD_GROUPS) {
        float turned_back = 0.0f;
        for (uint c = 0; c < ODD; c++) {
          turned_back = metal::fma(shared[d - d % ODD + c], turn[d * ODD + c], turned_back);
        }
        back[ROTATED ? d : 0] = turned_back;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
} else {
  uint lower = IMPORTANCE ? columns - 1 - uint(importance_shape[2]) : 0;
  uint from = (place - heads) / (heads / GROUP) * MASS_TOKENS;
  for (uint t = from + thread_index_in_threadgroup; t < from + MASS_TOKENS; t += 32 * SIMD_GROUPS) {
    uint start = 0;
#pragma clang loop unroll(full)
    for (uint b = 0; b < BUCKETS; b++) {
      uint tokens = widths[b] - splits[b] * (DV + 2);
      if (t >= start && t < start + tokens) {
        auto scores = parts[b] + size_t(first + 1) * widths[b] - tokens + (t - start);
        float sum = 0.0f;
        for (uint h = 0; h < GROUP; h++) {
          sum += metal::exp(scores[size_t(h) * widths[b]] - head_top[h]) / head_total[h];
        }
        if (t >= lower && t + 1 < columns && IMPORTANCE) {  // the newest token has no importance yet
          sum = old_share[0] * importance[size_t(kv_row) * uint(importance_shape[2]) + (t - lower)] + new_share[0] * sum;
        }
        if (t >= lower) {
          mass[size_t(kv_row) * (columns - lower) + (t - lower)] = sum;
        }
      }
      start += tokens;
    }
  }
}
