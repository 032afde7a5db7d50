package image

// Protos lists the protocols that the policy language names, ascending.
var Protos = [...]Proto{Other, ICMP, TCP, UDP, ICMP6, SCTP}

// Last is the highest number a Port of the protocol can have. It reports false
// for a protocol that the language does not name; such packets count as Other.
func (p Proto) Last() (uint16, bool) {
	switch p {
	case TCP, UDP, SCTP:
		return 65535, true
	case ICMP, ICMP6:
		return 255, true
	case Other:
		return 0, true
	}
	return 0, false
}
