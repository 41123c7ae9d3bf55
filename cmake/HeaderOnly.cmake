# meki_find_headers(VARIABLE HEADER REMEDY [PACKAGE]): the include directory of a header-only library, from the system
# or from the Python package PACKAGE, which keeps its headers in PACKAGE/include. If there is none, an error that names
# REMEDY.
#
# When cross-compiling, the library is the building machine's. Its directory may be /usr/include, whose other headers
# are those of the wrong system: the library's own are copied into the build directory.
function(meki_find_headers variable header remedy)
  set(package ${ARGN})
  set(search ${variable} ${header} PATH_SUFFIXES ${package}/include NO_CMAKE_FIND_ROOT_PATH)
  find_path(${search})
  if(NOT ${variable} AND package)
    find_program(MEKI_PYTHON NAMES python3 python NO_CMAKE_FIND_ROOT_PATH)
    mark_as_advanced(MEKI_PYTHON)
    if(MEKI_PYTHON)
      execute_process(COMMAND ${MEKI_PYTHON} -c "import ${package}; print(*${package}.__path__)"
                      OUTPUT_VARIABLE directory OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      find_path(${search} HINTS "${directory}/include")
    endif()
  endif()
  if(NOT EXISTS "${${variable}}/${header}")
    message(FATAL_ERROR "${variable} is \"${${variable}}\", expected a directory with ${header} in it; install the "
                        "library (${remedy}) or name its directory with -D${variable}=DIRECTORY")
  endif()
  set(copies "${CMAKE_BINARY_DIR}/headers")
  if(CMAKE_CROSSCOMPILING AND NOT "${${variable}}" STREQUAL copies)
    get_filename_component(library ${header} DIRECTORY)
    file(COPY "${${variable}}/${library}" DESTINATION "${copies}")
    set(${variable} "${copies}" CACHE PATH "Directory of ${header}" FORCE)
  endif()
endfunction()
