// How a function is exported: with a text that says what it takes and returns, which kernels.py
// compares with its own table when it loads the library.
#pragma once

#include <string>
#include <type_traits>

#include "structs.h"

template <typename T>
std::string type_name() {
  if constexpr (std::is_void_v<T>) return "none";
  if constexpr (std::is_pointer_v<T>) return "pointer";
  if constexpr (std::is_same_v<T, bool>) return "bool";
  if constexpr (std::is_same_v<T, int32_t>) return "int32";
  if constexpr (std::is_same_v<T, int64_t>) return "int64";
  if constexpr (std::is_same_v<T, Map>) return "Map";
  if constexpr (std::is_same_v<T, Norm>) return "Norm";
  if constexpr (std::is_same_v<T, Entries>) return "Entries";
  if constexpr (std::is_same_v<T, Positions>) return "Positions";
  if constexpr (std::is_same_v<T, Plane>) return "Plane";
}

template <typename Result, typename... Arguments>
std::string signature(Result (*)(Arguments...)) {
  std::string text;
  ((text += (text.empty() ? "" : ", ") + type_name<Arguments>()), ...);
  return type_name<Result>() + " (" + text + ")";
}

#define EXPORTED(function)                                \
  const char* function##_signature() {                    \
    static const std::string text = signature(&function); \
    return text.c_str();                                  \
  }
