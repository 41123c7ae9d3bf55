# Android's own toolchain file, from the NDK that the environment names.
set(ndk "$ENV{ANDROID_NDK_HOME}")
if(NOT EXISTS "${ndk}/build/cmake/android.toolchain.cmake")
  message(FATAL_ERROR "ANDROID_NDK_HOME is \"${ndk}\", expected the directory of an Android NDK, with "
                      "build/cmake/android.toolchain.cmake in it; install the NDK (r26 or newer) and set the variable")
endif()
include("${ndk}/build/cmake/android.toolchain.cmake")
