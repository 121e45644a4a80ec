# find_package(emaudit [COMPONENTS shared|static|dynamic]) finds the library beside an installed copy of this file, or
# what Cargo built when emaudit_DIR points into the source tree.
#
#   emaudit::emaudit  the shared library
#   emaudit::static   the static library
#   emaudit::dynamic  the C++ headers alone; the program loads the library at run time (EMAUDIT_DYNAMIC)
#
# EMAUDIT_LIBRARY_DIR names a directory with libemaudit.so and libemaudit.a, before all others.

get_filename_component(_emaudit_here "${CMAKE_CURRENT_LIST_FILE}" REALPATH)
get_filename_component(_emaudit_here "${_emaudit_here}" DIRECTORY)

# From <libdir>/cmake/emaudit, with or without a multiarch directory, from <prefix>/share/cmake/emaudit, and from the
# source tree. Never from elsewhere: headers and library belong together.
find_path(EMAUDIT_INCLUDE_DIR emaudit.h NO_DEFAULT_PATH PATHS
  "${_emaudit_here}/../../include" "${_emaudit_here}/../../../include" "${_emaudit_here}/../../../../include")
set(_emaudit_places "${EMAUDIT_LIBRARY_DIR}" "${_emaudit_here}/../.." "${_emaudit_here}/../../../lib"
  "${_emaudit_here}/../../../lib/${CMAKE_LIBRARY_ARCHITECTURE}" "${_emaudit_here}/../../../lib64"
  "$ENV{CARGO_TARGET_DIR}/release" "${_emaudit_here}/../../target/release" "$ENV{CARGO_TARGET_DIR}/debug"
  "${_emaudit_here}/../../target/debug")
list(REMOVE_ITEM _emaudit_places "" "/release" "/debug")
find_library(EMAUDIT_SHARED_LIBRARY
  NAMES "${CMAKE_SHARED_LIBRARY_PREFIX}emaudit${CMAKE_SHARED_LIBRARY_SUFFIX}" NO_DEFAULT_PATH PATHS ${_emaudit_places})
find_library(EMAUDIT_STATIC_LIBRARY
  NAMES "${CMAKE_STATIC_LIBRARY_PREFIX}emaudit${CMAKE_STATIC_LIBRARY_SUFFIX}" NO_DEFAULT_PATH PATHS ${_emaudit_places})
mark_as_advanced(EMAUDIT_INCLUDE_DIR EMAUDIT_SHARED_LIBRARY EMAUDIT_STATIC_LIBRARY)

set(emaudit_shared_FOUND FALSE)
set(emaudit_static_FOUND FALSE)
set(emaudit_dynamic_FOUND FALSE)

if(EMAUDIT_INCLUDE_DIR)
  set(emaudit_dynamic_FOUND TRUE)
  if(NOT TARGET emaudit::dynamic)
    add_library(emaudit::dynamic INTERFACE IMPORTED)
    set_target_properties(emaudit::dynamic PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${EMAUDIT_INCLUDE_DIR}"
      INTERFACE_COMPILE_DEFINITIONS EMAUDIT_DYNAMIC
      INTERFACE_LINK_LIBRARIES "${CMAKE_DL_LIBS}")
  endif()
endif()

if(EMAUDIT_INCLUDE_DIR AND EMAUDIT_SHARED_LIBRARY)
  set(emaudit_shared_FOUND TRUE)
  if(NOT TARGET emaudit::emaudit)
    set(_emaudit_location "${EMAUDIT_SHARED_LIBRARY}")
    # Cargo leaves libemaudit.so alone; programs look for its SONAME.
    if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
      file(STRINGS "${EMAUDIT_INCLUDE_DIR}/emaudit.h" _emaudit_abi REGEX "^#define EMAUDIT_ABI_VERSION [0-9]+$")
      string(REGEX REPLACE ".* " "" _emaudit_abi "${_emaudit_abi}")
      get_filename_component(_emaudit_directory "${EMAUDIT_SHARED_LIBRARY}" DIRECTORY)
      set(_emaudit_location "${_emaudit_directory}/libemaudit.so.${_emaudit_abi}")
      if(NOT EXISTS "${_emaudit_location}")
        set(_emaudit_location "${CMAKE_BINARY_DIR}/emaudit/libemaudit.so.${_emaudit_abi}")
        file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/emaudit")
        file(CREATE_LINK "${EMAUDIT_SHARED_LIBRARY}" "${_emaudit_location}" SYMBOLIC)
      endif()
    endif()
    add_library(emaudit::emaudit SHARED IMPORTED)
    set_target_properties(emaudit::emaudit PROPERTIES
      IMPORTED_LOCATION "${_emaudit_location}"
      INTERFACE_INCLUDE_DIRECTORIES "${EMAUDIT_INCLUDE_DIR}")
  endif()
endif()

if(EMAUDIT_INCLUDE_DIR AND EMAUDIT_STATIC_LIBRARY)
  set(emaudit_static_FOUND TRUE)
  if(NOT TARGET emaudit::static)
    add_library(emaudit::static STATIC IMPORTED)
    set_target_properties(emaudit::static PROPERTIES
      IMPORTED_LOCATION "${EMAUDIT_STATIC_LIBRARY}"
      INTERFACE_INCLUDE_DIRECTORIES "${EMAUDIT_INCLUDE_DIR}")
    if(UNIX AND NOT APPLE)
      # A shared library that swallows this one does not export it again.
      set_target_properties(emaudit::static PROPERTIES
        INTERFACE_LINK_LIBRARIES "pthread;${CMAKE_DL_LIBS};m"
        INTERFACE_LINK_OPTIONS "LINKER:--exclude-libs,libemaudit.a")
    endif()
  endif()
endif()

# Without components, any library will do.
set(emaudit_FOUND FALSE)
if(emaudit_FIND_COMPONENTS)
  set(emaudit_FOUND TRUE)
  foreach(_emaudit_component IN LISTS emaudit_FIND_COMPONENTS)
    if(emaudit_FIND_REQUIRED_${_emaudit_component} AND NOT emaudit_${_emaudit_component}_FOUND)
      set(emaudit_FOUND FALSE)
      set(emaudit_NOT_FOUND_MESSAGE "emaudit has no component ${_emaudit_component} in ${_emaudit_places}")
    endif()
  endforeach()
elseif(emaudit_shared_FOUND OR emaudit_static_FOUND)
  set(emaudit_FOUND TRUE)
else()
  set(emaudit_NOT_FOUND_MESSAGE
    "no libemaudit in ${_emaudit_places}: run `cargo build --release -p emaudit`, or set EMAUDIT_LIBRARY_DIR")
endif()
