// How the elements of a tensor are stored, by the numbers that Python passes: STORAGE in _library.py.
#pragma once

#include <cstdint>

namespace fastkd {

enum Storage : std::int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kUInt8 = 4 };

}  // namespace fastkd
