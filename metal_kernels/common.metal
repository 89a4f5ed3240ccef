// Goes before every kernel. Products and sums round one by one, as in the references: no fused multiply-add.
#pragma METAL fp contract(off)

// The value of `bits` bits at bit `index * bits` of a stream of 32-bit words, lowest bits first.
// P is a pointer to uint in any address space. `bits` is at most 16 or exactly 32.
template <typename P>
uint read_bits(P words, uint index, uint bits) {
  uint first = index * bits;
  uint word = first >> 5, shift = first & 31;
  uint value = words[word] >> shift;
  if (shift + bits > 32) {
    value |= words[word + 1] << (32 - shift);
  }
  return bits == 32 ? value : value & ((1u << bits) - 1);
}

// E4M3 (4 exponent bits, bias 7, 3 mantissa bits, no infinity) as mx.to_fp8 rounds: half to even, saturating at 448.
inline uchar to_e4m3(float value) {
  uint bits = as_type<uint>(value);
  uint sign = (bits >> 24) & 0x80;
  bits &= 0x7fffffff;
  if (bits >= 0x43e00000) {  // 448
    return uchar(sign | 0x7e);
  }
  if (bits < 0x3c800000) {  // below 2^-6 codes are multiples of 2^-9: let the float adder round
    return uchar(sign | (as_type<uint>(as_type<float>(bits) + 16384.0f) - as_type<uint>(16384.0f)));
  }
  uint odd = (bits >> 20) & 1;
  return uchar(sign | ((bits - (120u << 23) + 0x7ffff + odd) >> 20));
}

inline float from_e4m3(uchar code) {
  uint magnitude = code & 0x7f;
  if (magnitude == 0x7f) {
    return NAN;
  }
  float value = magnitude < 8 ? float(magnitude) * 0.001953125f : as_type<float>((magnitude << 20) + (120u << 23));
  return (code & 0x80) != 0 ? -value : value;
}

// (a * key + b) mod 2^31 - 1: the high bits count as much as the low ones, so fold them twice. No division.
inline uint mersenne_hash(uint a, uint b, uint key) {
  const ulong prime = 0x7fffffff;
  ulong residue = ulong(a) * key + b;
  residue = (residue & prime) + (residue >> 31);
  residue = (residue & prime) + (residue >> 31);
  return uint(residue >= prime ? residue - prime : residue);
}

// Multiplies a row of DIM floats in threadgroup memory by a Hadamard matrix, each entry standing for ODD dims, in place
// by one SIMD-group. P is a pointer to threadgroup float.
template <int DIM, int ODD, typename P>
void hadamard(P row, uint lane) {
  for (uint far = ODD; far < DIM; far *= 2) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = lane; i < DIM / 2; i += 32) {
      uint near = i / far * far + i;
      float sum = row[near] + row[near + far];
      row[near + far] = row[near] - row[near + far];
      row[near] = sum;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
