# cmake --install: the library, its headers as "runtime/..." and what find_package(meki) reads.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(destination "${CMAKE_INSTALL_LIBDIR}/cmake/meki")
install(TARGETS meki EXPORT meki COMPONENT runtime)
install(EXPORT meki NAMESPACE meki:: FILE meki-targets.cmake DESTINATION ${destination} COMPONENT runtime)
install(DIRECTORY runtime DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT runtime FILES_MATCHING PATTERN "*.h"
        PATTERN apps EXCLUDE PATTERN ort EXCLUDE PATTERN simd EXCLUDE PATTERN node.h EXCLUDE PATTERN parse.h EXCLUDE)
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/meki-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(FILES cmake/meki-config.cmake "${CMAKE_CURRENT_BINARY_DIR}/meki-config-version.cmake"
        DESTINATION ${destination} COMPONENT runtime)
