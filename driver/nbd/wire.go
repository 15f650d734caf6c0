package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Magic numbers of the protocol (doc/proto.md, "Newstyle negotiation",
// "Fixed newstyle negotiation" and "Transmission").
const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// Handshake and client flags.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Options, "Option types".
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10
)

// Option replies, "Option reply types".
const (
	repAck        = 1
	repServer     = 2
	repInfo       = 3
	repMeta       = 4
	repErrUnsup   = 1<<31 + 1
	repErrPolicy  = 1<<31 + 2
	repErrInvalid = 1<<31 + 3
	repErrUnknown = 1<<31 + 6
	repErrStop    = 1<<31 + 7 // NBD_REP_ERR_SHUTDOWN
	repErrTooBig  = 1<<31 + 9
)

// Information types of NBD_OPT_INFO and NBD_OPT_GO.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags.
const (
	txHasFlags    = 1 << 0
	txReadOnly    = 1 << 1
	txFlush       = 1 << 2
	txFUA         = 1 << 3
	txTrim        = 1 << 5
	txWriteZeroes = 1 << 6
	txDF          = 1 << 7
	txMultiConn   = 1 << 8
	txFastZero    = 1 << 11
)

// Commands, "Request types".
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
	cmdCount       = 8 // the commands above are smaller
)

// Command flags.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

// Structured reply flags and types.
const (
	chunkDone        = 1 << 0
	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1
)

// States of base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

// Error values of the transmission phase, "Error values".
const (
	ePerm     = 1
	eIO       = 5
	eInval    = 22
	eNoSpc    = 28
	eOverflow = 75
	eNotSup   = 95
	eShutdown = 108
)

const (
	contextAllocation = "base:allocation"
	contextSince      = "scoria:since="
	contextBitmap     = "qemu:dirty-bitmap:" // as QEMU's own server calls its bitmaps

	// stateChanged is the state of the latter two: what is there may differ from
	// the snapshot.
	stateChanged = 1 << 0

	requestBytes   = 28
	optHeaderBytes = 16
	chunkBytes     = 20 // header of a structured reply chunk
	simpleBytes    = 16

	// maxString is the protocol's limit for names, queries and messages, in bytes.
	maxString = 4096
)

// Errors of the codec; the peer broke the protocol.
var (
	errMagic     = errors.New("wrong magic number")
	errMalformed = errors.New("malformed option")
	errTooLong   = errors.New("string longer than 4096 bytes")
	errTooMany   = errors.New("too many queries")
)

// request is a command of the transmission phase.
//
//	0        4       6      8         16        24       28
//	| magic  | flags | type | cookie  | offset  | length |  big endian
type request struct {
	flags, typ     uint16
	cookie, offset uint64
	length         uint32
}

func decodeRequest(p []byte) (request, error) {
	_ = p[requestBytes-1]
	if m := binary.BigEndian.Uint32(p); m != magicRequest {
		return request{}, fmt.Errorf("request begins with %#08x, not %#08x: %w", m, uint32(magicRequest), errMagic)
	}
	return request{
		flags:  binary.BigEndian.Uint16(p[4:]),
		typ:    binary.BigEndian.Uint16(p[6:]),
		cookie: binary.BigEndian.Uint64(p[8:]),
		offset: binary.BigEndian.Uint64(p[16:]),
		length: binary.BigEndian.Uint32(p[24:]),
	}, nil
}

func appendRequest(b []byte, r request) []byte {
	b = binary.BigEndian.AppendUint32(b, magicRequest)
	b = binary.BigEndian.AppendUint16(b, r.flags)
	b = binary.BigEndian.AppendUint16(b, r.typ)
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	b = binary.BigEndian.AppendUint64(b, r.offset)
	return binary.BigEndian.AppendUint32(b, r.length)
}

// decodeOptHeader takes apart what precedes an option's data.
//
//	0        8        12       16
//	| magic  | option | length |
func decodeOptHeader(p []byte) (option, length uint32, err error) {
	_ = p[optHeaderBytes-1]
	if m := binary.BigEndian.Uint64(p); m != magicOption {
		return 0, 0, fmt.Errorf("option begins with %#016x, not %#016x: %w", m, uint64(magicOption), errMagic)
	}
	return binary.BigEndian.Uint32(p[8:]), binary.BigEndian.Uint32(p[12:]), nil
}

func appendOption(b []byte, option uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// cutString takes a string with a 32-bit length off p.
func cutString(p []byte) (s string, rest []byte, err error) {
	if len(p) < 4 {
		return "", nil, fmt.Errorf("%d bytes left where a string's length should be: %w", len(p), errMalformed)
	}
	n, p := binary.BigEndian.Uint32(p), p[4:]
	if uint64(n) > uint64(len(p)) {
		return "", nil, fmt.Errorf("string of %d bytes in %d bytes of data: %w", n, len(p), errMalformed)
	}
	if n > maxString {
		return "", nil, fmt.Errorf("%d bytes: %w", n, errTooLong)
	}
	return string(p[:n]), p[n:], nil
}

// parseInfoRequest takes apart the data of NBD_OPT_INFO and NBD_OPT_GO:
//
//	| name length (4) | name | number of requests (2) | requests (2 each) |
func parseInfoRequest(p []byte) (name string, infos []uint16, err error) {
	name, p, err = cutString(p)
	if err != nil {
		return "", nil, fmt.Errorf("export name: %w", err)
	}
	if len(p) < 2 {
		return "", nil, fmt.Errorf("%d bytes left where the number of information requests should be: %w", len(p), errMalformed)
	}
	n, p := int(binary.BigEndian.Uint16(p)), p[2:]
	if len(p) != 2*n {
		return "", nil, fmt.Errorf("%d bytes left for %d information requests: %w", len(p), n, errMalformed)
	}
	for ; n > 0; n-- {
		infos = append(infos, binary.BigEndian.Uint16(p))
		p = p[2:]
	}
	return name, infos, nil
}

// parseMetaRequest takes apart the data of NBD_OPT_LIST_META_CONTEXT and
// NBD_OPT_SET_META_CONTEXT:
//
//	| name length (4) | name | number of queries (4) | { length (4) | query }… |
func parseMetaRequest(p []byte, maxQueries int) (name string, queries []string, err error) {
	name, p, err = cutString(p)
	if err != nil {
		return "", nil, fmt.Errorf("export name: %w", err)
	}
	if len(p) < 4 {
		return "", nil, fmt.Errorf("%d bytes left where the number of queries should be: %w", len(p), errMalformed)
	}
	n, p := binary.BigEndian.Uint32(p), p[4:]
	if n > uint32(maxQueries) {
		return "", nil, fmt.Errorf("%d queries, at most %d are allowed: %w", n, maxQueries, errTooMany)
	}
	for i := range n {
		var q string
		if q, p, err = cutString(p); err != nil {
			return "", nil, fmt.Errorf("query %d: %w", i, err)
		}
		queries = append(queries, q)
	}
	if len(p) != 0 {
		return "", nil, fmt.Errorf("%d bytes behind the last query: %w", len(p), errMalformed)
	}
	return name, queries, nil
}

// appendOptReply appends one reply to an option.
//
//	0        8        12     16       20
//	| magic  | option | type | length | data |
func appendOptReply(b []byte, option, typ uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, typ)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// appendInfoExport appends the data of NBD_INFO_EXPORT; without its type it is
// also what answers NBD_OPT_EXPORT_NAME.
func appendInfoExport(b []byte, size uint64, flags uint16) []byte {
	b = binary.BigEndian.AppendUint64(b, size)
	return binary.BigEndian.AppendUint16(b, flags)
}

func appendInfoBlockSize(b []byte, minimum, preferred, maximum uint32) []byte {
	b = binary.BigEndian.AppendUint16(b, infoBlockSize)
	b = binary.BigEndian.AppendUint32(b, minimum)
	b = binary.BigEndian.AppendUint32(b, preferred)
	return binary.BigEndian.AppendUint32(b, maximum)
}

func appendInfoString(b []byte, typ uint16, s string) []byte {
	b = binary.BigEndian.AppendUint16(b, typ)
	return append(b, s...)
}

// appendServer appends the data of NBD_REP_SERVER.
func appendServer(b []byte, name string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(name)))
	return append(b, name...)
}

// appendMeta appends the data of NBD_REP_META_CONTEXT.
func appendMeta(b []byte, id uint32, name string) []byte {
	b = binary.BigEndian.AppendUint32(b, id)
	return append(b, name...)
}

// appendSimple appends a simple reply.
//
//	0        4       8        16
//	| magic  | error | cookie | data of a read
func appendSimple(b []byte, code uint32, cookie uint64) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimple)
	b = binary.BigEndian.AppendUint32(b, code)
	return binary.BigEndian.AppendUint64(b, cookie)
}

// appendChunk appends the header of a structured reply chunk.
//
//	0        4       6      8        16       20
//	| magic  | flags | type | cookie | length | payload
func appendChunk(b []byte, flags, typ uint16, cookie uint64, length uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, magicStructured)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, length)
}

// appendDataChunk appends what precedes the length bytes of a data chunk.
func appendDataChunk(b []byte, flags uint16, cookie, offset uint64, length uint32) []byte {
	b = appendChunk(b, flags, chunkData, cookie, 8+length)
	return binary.BigEndian.AppendUint64(b, offset)
}

func appendHoleChunk(b []byte, flags uint16, cookie, offset uint64, length uint32) []byte {
	b = appendChunk(b, flags, chunkHole, cookie, 12)
	b = binary.BigEndian.AppendUint64(b, offset)
	return binary.BigEndian.AppendUint32(b, length)
}

// appendErrorChunk appends a whole error chunk, the last of its reply.
func appendErrorChunk(b []byte, cookie uint64, code uint32, message string) []byte {
	if len(message) > maxString {
		message = message[:maxString]
	}
	b = appendChunk(b, chunkDone, chunkError, cookie, uint32(6+len(message)))
	b = binary.BigEndian.AppendUint32(b, code)
	b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
	return append(b, message...)
}

// allowedFlags returns the flags that a command may carry, "Command flags".
// FUA is accepted on all, as the protocol demands of servers that announce it.
func allowedFlags(typ uint16, structured bool) uint16 {
	switch typ {
	case cmdRead:
		if structured {
			return cmdFlagFUA | cmdFlagDF
		}
	case cmdWriteZeroes:
		return cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero
	case cmdBlockStatus:
		return cmdFlagFUA | cmdFlagReqOne
	}
	return cmdFlagFUA
}
