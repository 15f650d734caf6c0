package wire

import "fmt"

// Request is the type of a message from the front end ("Front-end message
// types") or, in replies, what it answers.
type Request uint32

// Requests of the front end.
const (
	GetFeatures         Request = 1
	SetFeatures         Request = 2
	SetOwner            Request = 3
	ResetOwner          Request = 4
	SetMemTable         Request = 5
	SetLogBase          Request = 6
	SetLogFD            Request = 7
	SetVringNum         Request = 8
	SetVringAddr        Request = 9
	SetVringBase        Request = 10
	GetVringBase        Request = 11
	SetVringKick        Request = 12
	SetVringCall        Request = 13
	SetVringErr         Request = 14
	GetProtocolFeatures Request = 15
	SetProtocolFeatures Request = 16
	GetQueueNum         Request = 17
	SetVringEnable      Request = 18
	SetBackendReqFD     Request = 21
	GetConfig           Request = 24
	SetConfig           Request = 25
	GetInflightFD       Request = 31
	SetInflightFD       Request = 32
	ResetDevice         Request = 34
	GetMaxMemSlots      Request = 36
	AddMemReg           Request = 37
	RemMemReg           Request = 38
	SetStatus           Request = 39
	GetStatus           Request = 40
)

// BackendConfigChange is the one request that this back end sends, on the
// channel of SetBackendReqFD: VHOST_USER_BACKEND_CONFIG_CHANGE_MSG. The channel
// has its own numbers.
const BackendConfigChange Request = 2

// limits are the payload sizes in bytes and the numbers of descriptors that a
// request may have.
type limits struct {
	name             string
	minSize, maxSize uint32
	minFDs, maxFDs   uint8
}

var requests = [...]limits{
	GetFeatures:         {name: "GET_FEATURES"},
	SetFeatures:         {name: "SET_FEATURES", minSize: 8, maxSize: 8},
	SetOwner:            {name: "SET_OWNER"},
	ResetOwner:          {name: "RESET_OWNER"},
	SetMemTable:         {name: "SET_MEM_TABLE", minSize: 8, maxSize: 8 + MaxMemTableRegions*regionSize, maxFDs: MaxMemTableRegions},
	SetLogBase:          {name: "SET_LOG_BASE", minSize: 8, maxSize: 16, maxFDs: 1},
	SetLogFD:            {name: "SET_LOG_FD", maxSize: 8, minFDs: 1, maxFDs: 1},
	SetVringNum:         {name: "SET_VRING_NUM", minSize: 8, maxSize: 8},
	SetVringAddr:        {name: "SET_VRING_ADDR", minSize: vringAddrSize, maxSize: vringAddrSize},
	SetVringBase:        {name: "SET_VRING_BASE", minSize: 8, maxSize: 8},
	GetVringBase:        {name: "GET_VRING_BASE", minSize: 8, maxSize: 8},
	SetVringKick:        {name: "SET_VRING_KICK", minSize: 8, maxSize: 8, maxFDs: 1},
	SetVringCall:        {name: "SET_VRING_CALL", minSize: 8, maxSize: 8, maxFDs: 1},
	SetVringErr:         {name: "SET_VRING_ERR", minSize: 8, maxSize: 8, maxFDs: 1},
	GetProtocolFeatures: {name: "GET_PROTOCOL_FEATURES"},
	SetProtocolFeatures: {name: "SET_PROTOCOL_FEATURES", minSize: 8, maxSize: 8},
	GetQueueNum:         {name: "GET_QUEUE_NUM"},
	SetVringEnable:      {name: "SET_VRING_ENABLE", minSize: 8, maxSize: 8},
	SetBackendReqFD:     {name: "SET_BACKEND_REQ_FD", maxSize: 8, minFDs: 1, maxFDs: 1},
	GetConfig:           {name: "GET_CONFIG", minSize: configHeaderSize, maxSize: MaxPayload},
	SetConfig:           {name: "SET_CONFIG", minSize: configHeaderSize, maxSize: MaxPayload},
	GetInflightFD:       {name: "GET_INFLIGHT_FD", minSize: inflightMinSize, maxSize: inflightSize},
	SetInflightFD:       {name: "SET_INFLIGHT_FD", minSize: inflightMinSize, maxSize: inflightSize, minFDs: 1, maxFDs: 1},
	ResetDevice:         {name: "RESET_DEVICE"},
	GetMaxMemSlots:      {name: "GET_MAX_MEM_SLOTS", maxSize: 8},
	AddMemReg:           {name: "ADD_MEM_REG", minSize: 8 + regionSize, maxSize: 8 + regionSize, minFDs: 1, maxFDs: 1},
	// Some front ends pass the descriptor of a region that they remove; it is
	// closed unused, as the specification asks.
	RemMemReg: {name: "REM_MEM_REG", minSize: 8 + regionSize, maxSize: 8 + regionSize, maxFDs: 1},
	SetStatus: {name: "SET_STATUS", minSize: 8, maxSize: 8},
	GetStatus: {name: "GET_STATUS", maxSize: 8},
}

func requestLimits(r Request) *limits {
	if uint64(r) >= uint64(len(requests)) || requests[r].name == "" {
		return nil
	}
	return &requests[r]
}

// String returns the name in the specification, without its prefix.
func (r Request) String() string {
	if l := requestLimits(r); l != nil {
		return l.name
	}
	return fmt.Sprintf("message %d", uint32(r))
}

// HasReply reports whether the back end answers r with a payload of its own,
// REPLY_ACK or not.
func (r Request) HasReply() bool {
	switch r {
	case GetFeatures, GetProtocolFeatures, GetQueueNum, GetVringBase, GetConfig,
		GetInflightFD, GetMaxMemSlots, GetStatus, SetLogBase:
		return true
	}
	return false
}

// Protocol feature bits (VHOST_USER_PROTOCOL_F_*).
const (
	ProtocolMQ                uint64 = 1 << 0
	ProtocolLogShmFD          uint64 = 1 << 1
	ProtocolReplyAck          uint64 = 1 << 3
	ProtocolBackendReq        uint64 = 1 << 5
	ProtocolConfig            uint64 = 1 << 9
	ProtocolInflightShmFD     uint64 = 1 << 12
	ProtocolResetDevice       uint64 = 1 << 13
	ProtocolConfigureMemSlots uint64 = 1 << 15
	ProtocolStatus            uint64 = 1 << 16
)

// Feature bits that belong to vhost and not to virtio.
const (
	FeatureLogAll           uint64 = 1 << 26 // VHOST_F_LOG_ALL
	FeatureProtocolFeatures uint64 = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES
)

// VringFlagLog asks to log writes to the used ring (VHOST_VRING_F_LOG).
const VringFlagLog uint32 = 1

// Flags of a Config message.
const (
	ConfigWritable  uint32 = 0 // the guest wrote a writable field
	ConfigMigration uint32 = 1 // live migration sets the field
)
