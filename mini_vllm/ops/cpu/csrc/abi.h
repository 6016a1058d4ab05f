// What every exported function follows. MV_API marks it; all else stays hidden. Arguments are raw pointers that the
// caller owns, sizes, strides in elements, and codes of element types. The result is 0, or kUnsupported when the
// arguments ask for what the kernel does not do, in which case nothing was written. Nothing throws.
#pragma once

#define MV_API extern "C" __attribute__((visibility("default")))

namespace mv {
enum DType { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum Result { kOk = 0, kUnsupported = 1, kOutOfRange = 2 };
}  // namespace mv
